"""What Prometheus reads: the text format, and the rules of ``promtool check metrics``."""

from __future__ import annotations

import re

from forescale.engine.serve.metrics import Gauges, ModelMetrics, exposition, process_exposition

SAMPLE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')
NOT_BASE_UNITS = re.compile(
    r"_(?:milli|micro|nano|kilo|mega)?(?:ms|us|ns|minutes|hours|kb|kib|mb|mib|percent)(?:_|$)"
)
NOW = Gauges(waiting=1, waiting_rows=2, in_flight=3, replicas=4)


def families(text: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Type and samples of each family by name; fails where the text format is not kept."""
    assert text.endswith("\n")
    found: dict[str, tuple[str, dict[str, float]]] = {}
    name = ""
    for line in text.splitlines():
        match line.split(" ", 3):
            case ["#", "HELP", name, about]:
                assert about
                assert name not in found, "a family stands in one place"
            case ["#", "TYPE", typed, kind]:
                assert typed == name
                found[name] = (kind, {})
            case _:
                sample = SAMPLE.fullmatch(line)
                assert sample, line
                kind, samples = found[name]
                endings = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
                assert sample[1] in {name + ending for ending in endings}
                assert line not in samples
                samples[f"{sample[1]}{{{sample[2] or ''}}}"] = float(sample[3])
    return found


def check_names(found: dict[str, tuple[str, dict[str, float]]]) -> None:
    for name, (kind, samples) in found.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), "no colons, no capitals"
        assert kind in {"counter", "gauge", "histogram"}
        assert name.endswith("_total") is (kind == "counter")
        assert not name.endswith(("_count", "_sum", "_bucket"))
        assert not NOT_BASE_UNITS.search(name), "base units, spelt out"
        assert not re.search(r"_(?:counter|gauge|histogram)(?:_|$)", name)
        assert all(("le=" in sample) is sample.startswith(f"{name}_bucket") for sample in samples)


def test_the_gateways_metrics_keep_to_the_conventions() -> None:
    metrics = ModelMetrics()
    metrics.outcomes["ok"] = 7
    for seconds in (0.0001, 0.02, 0.02, 100.0):
        metrics.latency_s.observe(seconds)
    metrics.note_batch(4, 0.5, threads=3)
    models = [("digits", "1", metrics, NOW), ('we"ird\\\n', "2", ModelMetrics(), NOW)]
    found = families((exposition(models) + process_exposition()).decode())
    check_names(found)
    requests = found["forescale_requests_total"][1]
    assert requests['forescale_requests_total{model="digits",version="1",outcome="ok"}'] == 7
    assert found["forescale_replica_busy_seconds_total"][1].popitem()[1] in {0.0, 0.5}
    cores = found["forescale_replica_core_seconds_total"][1]
    assert cores['forescale_replica_core_seconds_total{model="digits",version="1"}'] == 1.5
    kind, latency = found["forescale_request_duration_seconds"]
    assert kind == "histogram"
    mine = {sample: value for sample, value in latency.items() if "digits" in sample}
    buckets = [value for sample, value in mine.items() if "_bucket" in sample]
    assert buckets == sorted(buckets)
    labels = '{model="digits",version="1"}'
    assert buckets[-1] == mine["forescale_request_duration_seconds_count" + labels] == 4
    assert mine["forescale_request_duration_seconds_sum" + labels] == 100.0401
    assert any('le="+Inf"' in sample for sample in mine)


def test_the_process_is_described_as_by_prometheus_own_clients() -> None:
    found = families(process_exposition().decode())
    assert found["process_resident_memory_bytes"][1]["process_resident_memory_bytes{}"] > 1 << 20
    assert 1.6e9 < found["process_start_time_seconds"][1]["process_start_time_seconds{}"] < 1e11
    assert [*found["forescale_build_info"][1].values()] == [1]


def test_there_is_something_to_read_without_models() -> None:
    assert set(families(exposition([]).decode())) >= {"forescale_requests_total", "forescale_replicas"}
