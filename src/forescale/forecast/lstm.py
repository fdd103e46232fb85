"""An LSTM that sees a series as distances from its local level in units of its local scale.

Hochreiter and Schmidhuber, "Long short-term memory" (Neural Computation, 1997), trained on the pinball
loss of all targets and levels at once as in Wen et al., "A multi-horizon quantile recurrent forecaster"
(2017). Without the normalisation the same network is far worse: devices and demand change their level.

Axes: T = time, B = example, W = step of the window, J = target, L = level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from forescale.forecast.examples import seasons_back, steps_before, targets_ahead
from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import FEW, Fit, path_fit

_WINDOW = 60  # values the network sees
_HIDDEN = 32
_EXAMPLES = 4000  # the newest ones
_BATCH = 128
_RATE = 4e-3
_NEWEST = 5  # the level is also told as that of the last so many values
_FLOOR = 0.05  # of the history's own scale, below which a window's scale does not count
_SQUEEZE = 3.0  # scales beyond which distances grow logarithmically


@dataclass(frozen=True, slots=True, kw_only=True)
class LstmModel:
    """One network for one series; a fit takes seconds, a forecast about a millisecond.

    Attributes:
        season_steps: length of a season: the network is told the values a season before the targets.
        updates: how often the weights are changed; the time of a fit is in proportion.
        seed: of the initial weights and of the choice of examples.
    """

    season_steps: int | None = None
    updates: int = 400
    seed: int = 0

    @property
    def name(self) -> str:
        return "LSTM"

    @property
    def history_steps(self) -> int:
        return _EXAMPLES + _WINDOW + 2 * (self.season_steps or 0)

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> Fit:
        known = steps_before(self.season_steps, len(values_T), targets, _WINDOW)
        begin = max(_WINDOW, known)
        longest = int(targets.lead_steps_J.max())
        ends = np.arange(begin, len(values_T) - longest + 1)[-_EXAMPLES:]
        if np.ptp(values_T) == 0.0 or len(ends) < FEW:
            return path_fit(np.full((1, len(levels)), values_T[-1]), values_T, targets)
        floor = _FLOOR * float(np.abs(np.diff(values_T)).mean())
        sight = _Sight(targets=targets, season_steps=self.season_steps if known else None, floor=floor)
        windows_BW, context_BC, level_B, scale_B = sight.of(values_T, ends)
        targets_BJ = (targets_ahead(values_T, ends, targets) - level_B[:, None]) / scale_B[:, None]
        network = _Network(context_BC.shape[1], len(targets.lead_steps_J), len(levels), self.seed)
        self._train(network, windows_BW, context_BC, targets_BJ, scale_B / scale_B.mean(), levels)
        return LstmFit(network=network, sight=sight)

    def _train(
        self,
        network: _Network,
        windows_BW: np.ndarray,
        context_BC: np.ndarray,
        targets_BJ: Array,
        weight_B: Array,
        levels: Sequence[float],
    ) -> None:
        """Examples weigh as much as their scale: what counts is the loss in the unit of the series."""
        windows, context = torch.from_numpy(windows_BW), torch.from_numpy(context_BC)
        targets = torch.from_numpy(targets_BJ.astype(np.float32))
        weights = torch.from_numpy(weight_B.astype(np.float32))
        levels_L = torch.tensor(levels)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        for _ in range(self.updates):
            chosen = torch.randint(len(windows), (_BATCH,), generator=generator)
            shortfall = targets[chosen][..., None] - network(windows[chosen], context[chosen])
            losses = torch.maximum(levels_L * shortfall, (levels_L - 1.0) * shortfall)
            loss = (losses.mean(dim=(1, 2)) * weights[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@dataclass(frozen=True, slots=True, kw_only=True)
class LstmFit:
    """A trained network; it looks at the newest values whenever it is asked."""

    network: _Network
    sight: _Sight

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:  # noqa: ARG002 - the protocol's
        windows_BW, context_BC, level_B, scale_B = self.sight.of(values_T, np.array([len(values_T)]))
        with torch.inference_mode():
            found_JL = self.network(torch.from_numpy(windows_BW), torch.from_numpy(context_BC))[0].numpy()
        return np.sort(level_B[0] + scale_B[0] * found_JL.astype(np.float64), axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sight:
    """How the network sees a series.

    Attributes:
        floor: the least scale there is; a series that stood still would otherwise make any change endless.
    """

    targets: Targets
    season_steps: int | None
    floor: float

    def of(self, values_T: Array, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, Array, Array]:
        """windows_BW, context_BC (both float32 and normalised), level_B and scale_B before each end."""
        windows_BW = sliding_window_view(values_T, _WINDOW)[ends - _WINDOW]
        level_B = windows_BW.mean(axis=1)
        scale_B = np.abs(windows_BW - level_B[:, None]).mean(axis=1) + self.floor
        newest_B = windows_BW[:, -_NEWEST:].mean(axis=1)
        context = [(newest_B - level_B) / scale_B, np.log(scale_B / self.floor)]
        if self.season_steps:
            context += [
                (values_T[ends + lead - 1 - seasons_back(self.season_steps, lead)] - level_B) / scale_B
                for lead in self.targets.lead_steps_J.tolist()
            ]
        windows_BW = _squeezed((windows_BW - level_B[:, None]) / scale_B[:, None])
        context_BC = _squeezed(np.column_stack(context))
        return windows_BW.astype(np.float32), context_BC.astype(np.float32), level_B, scale_B


class _Network(nn.Module):
    def __init__(self, contexts: int, targets: int, levels: int, seed: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, _HIDDEN, batch_first=True)
        self.hidden = nn.Linear(_HIDDEN + contexts, _HIDDEN)
        self.head = nn.Linear(_HIDDEN, targets * levels)
        self._shape = (-1, targets, levels)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-(_HIDDEN**-0.5), _HIDDEN**-0.5, generator=generator)

    def forward(self, windows_BW: Tensor, context_BC: Tensor) -> Tensor:
        _, (last, _) = self.lstm(windows_BW[..., None])
        seen = torch.cat([last[0], context_BC], dim=1)
        return self.head(torch.relu(self.hidden(seen))).reshape(self._shape)


def _squeezed(distances: Array) -> Array:
    """A burst of a hundred scales is seen as one of about thirteen; what comes is not squeezed."""
    return _SQUEEZE * np.arcsinh(distances / _SQUEEZE)
