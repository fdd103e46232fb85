"""The command ``forescale``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from forescale import __version__
from forescale.cli.demo import demo
from forescale.cli.deploy import deploy, status, undeploy
from forescale.cli.devices import devices
from forescale.cli.failure import OneLineErrors
from forescale.cli.forecast import OptionalPlotFile, forecast
from forescale.cli.models import models
from forescale.cli.options import examples
from forescale.cli.plan import plan
from forescale.cli.profile import profile
from forescale.cli.replay import replay
from forescale.cli.rollouts import promote, rollback
from forescale.cli.serve import serve
from forescale.cli.train import train

app = typer.Typer(
    name="forescale",
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=examples("forescale demo", "forescale train train_me.py --devices 2 --steps 1000"),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"forescale {__version__}")
        raise typer.Exit


@app.callback()
def forescale(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Profiles, predicts, partitions and re-partitions models while they train, and serves them."""


app.command(epilog=examples("forescale devices", "forescale devices --devices 2 --json"))(devices)
app.command(epilog=examples("forescale profile train_me.py", "forescale profile models.py:large --json"))(
    profile
)
app.command(
    epilog=examples(
        "forescale plan train_me.py --devices 2",
        "forescale plan train_me.py --devices 2 --svg plan.svg",
        "forescale plan op_bert3_inference.json --free --json",
        "forescale plan op_bert3_inference.json --certify --compare --svg placement.svg",
        "forescale plan vgg16.txt --cluster cluster.toml",
        "forescale plan piper_resnet.json --devices 16 --memory 4GB",
    )
)(plan)
app.command(
    epilog=examples(
        "forescale train train_me.py --devices 2 --steps 1000",
        "forescale train train_me.py --steps 1000 --dir runs/first --checkpoint-every 100",
        "forescale train train_me.py --steps 1000 --report report.html",
        "forescale train train_me.py --steps 2000 --dir runs/first --resume",
    )
)(train)
app.command(
    epilog=examples(
        "forescale replay runs/first",
        "forescale replay runs/first --policy sudden_gain=0.2 --policy horizon_steps=10",
    )
)(replay)
app.command(
    cls=OptionalPlotFile,
    epilog=examples(
        "forescale forecast requests.csv",
        "forescale forecast requests.csv --step-s 60 --horizon-s 300 --horizon-s 3600 --plot fan.svg",
        "forescale forecast cpu.csv --column cpu_percent --season-s 86400 --backtest",
        "forescale forecast access_log.csv --step-s 10 --combine count --json",
        "forescale forecast requests.csv --events campaigns.csv --members lightgbm,lstm --backtest",
    ),
)(forecast)
app.command(epilog=examples("forescale demo", "forescale demo --out demo-output --steps 60"))(demo)
app.command(
    epilog=examples(
        "forescale serve", "forescale serve --state models --port 9000 --devices 2", "forescale serve --trust"
    )
)(serve)
app.add_typer(models, name="models")
app.command(
    epilog=examples(
        "forescale deploy digits@1 --wait",
        "forescale deploy digits@production --min 2",
        "forescale deploy digits@2 --canary 10%,50% --check quality",
    )
)(deploy)
app.command(epilog=examples("forescale promote digits", "forescale promote digits --full"))(promote)
app.command(epilog=examples("forescale rollback digits"))(rollback)
app.command(epilog=examples("forescale undeploy digits"))(undeploy)
app.command(epilog=examples("forescale status", "forescale status --watch", "forescale status --json"))(
    status
)
