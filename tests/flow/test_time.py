"""Every training-time sampler against its own analytic distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowray.config.flow import (
    AlphaTime,
    FlowConfig,
    LogitNormalTime,
    LogSNRTime,
    TimeConfig,
    TimeStage,
    UniformTime,
)
from flowray.config.schema import members
from flowray.flow.draws import Draws
from flowray.flow.time import time_config, training_times

POINTS = 100_000
KS_LIMIT = 1.95 / POINTS**0.5  # exceeded once in a thousand


class TimeSamplerContract:
    """What every member of TimeConfig must do; subclasses give `config` and `cdf`, the
    distribution without the floor.
    """

    config: UniformTime | LogitNormalTime | LogSNRTime | AlphaTime

    def cdf(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def floors(self) -> list[float]:
        return sorted({self.config.uniform_floor, 0.0, 0.35, 1.0})

    def with_floor(self, floor: float) -> UniformTime | LogitNormalTime | LogSNRTime | AlphaTime:
        return self.config.model_copy(update={"uniform_floor": floor})

    def test_inside_the_unit_interval_at_the_ends_of_u(self) -> None:
        u = torch.tensor([0.0, 1e-12, 0.2, 0.35, 0.5, 0.999999, 1 - 2**-24])
        for floor in self.floors():
            t = training_times(self.with_floor(floor), u)
            assert t.shape == u.shape
            assert t.dtype == torch.float32
            assert bool((t >= 0).all() and (t <= 1).all()), (floor, t)

    def test_monotone_above_the_floor(self) -> None:
        for floor in self.floors():
            u = torch.linspace(floor, 1 - 2**-24, 4001)[1:]
            t = training_times(self.with_floor(floor), u)
            if floor < 1:
                assert bool((t.diff() >= 0).all())
                assert float(t[-1] - t[0]) > 0.1

    def test_distribution(self) -> None:
        u = Draws(0, 0, POINTS, slice(None), torch.device("cpu")).uniform("time")
        for floor in self.floors():
            t = training_times(self.with_floor(floor), u).double().sort().values
            expected = floor * t + (1 - floor) * self.cdf(t)
            ranks = torch.arange(POINTS + 1, dtype=torch.float64) / POINTS
            distance = torch.maximum(
                (expected - ranks[:-1]).abs().max(), (expected - ranks[1:]).abs().max()
            )
            assert float(distance) < KS_LIMIT, (floor, float(distance))

    def test_the_floor_reaches_every_tenth(self) -> None:
        """Sampling starts at t = 0, so no part of [0, 1] may stay untrained."""
        u = torch.linspace(0, 1, POINTS + 1)[:-1]
        t = training_times(self.with_floor(0.2), u)
        share = torch.histc(t, bins=10, min=0, max=1) / POINTS
        assert float(share.min()) >= 0.2 / 10 * 0.98
        assert float((t < 0.01).float().mean()) >= 0.2 * 0.01 * 0.9

    def test_as_a_stage_of_a_curriculum(self) -> None:
        """In force until its step, by number or by fraction of the run; then `time`."""
        stage = self.with_floor(self.config.uniform_floor or 0.1)
        after = UniformTime()
        for end in ({"steps": 30}, {"fraction": 0.3}):
            config = FlowConfig(curriculum=(TimeStage(time=stage, **end),), time=after)
            assert [time_config(config, step, 100) for step in (0, 29)] == [stage, stage]
            assert [time_config(config, step, 100) for step in (30, 99, 10**9)] == [after] * 3
        assert time_config(FlowConfig(time=stage), 0, 100) == stage

    def test_a_stage_covers_t_0(self) -> None:
        """A stage, and the times after the last one."""
        if isinstance(self.config, UniformTime):
            return
        bare, first = self.with_floor(0.0), TimeStage(steps=10, time=UniformTime())
        with pytest.raises(
            ValueError,
            match=r"in flow\.curriculum leaves t = 0 untrained; its uniform_floor must be above 0",
        ):
            TimeStage(steps=10, time=bare)
        with pytest.raises(
            ValueError,
            match=(
                r"after flow\.curriculum leaves t = 0 untrained; its uniform_floor must be above 0"
            ),
        ):
            FlowConfig(curriculum=(first,), time=bare)
        FlowConfig(curriculum=(first,), time=self.with_floor(0.1))


class TestUniform(TimeSamplerContract):
    config = UniformTime()

    def cdf(self, t: Tensor) -> Tensor:
        return t


class TestLogitNormal(TimeSamplerContract):
    config = LogitNormalTime(mean=-0.4, std=1.3)

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t) + 0.4) / 1.3)


class TestLogSNR(TimeSamplerContract):
    config = LogSNRTime()

    def cdf(self, t: Tensor) -> Tensor:
        return ((2 * torch.logit(t) + 2) / 8).clamp(0, 1)

    def test_the_logs_range(self) -> None:
        """log-SNR in [-2, 6] is t in [0.27, 0.95]."""
        t = training_times(self.with_floor(0.0), torch.tensor([0.0, 0.5, 1 - 2**-24]))
        assert t.tolist() == pytest.approx([0.26894, 1 / (1 + torch.e**-1), 0.95257], abs=1e-4)


class TestAlpha(TimeSamplerContract):
    config = AlphaTime()

    def cdf(self, t: Tensor) -> Tensor:
        return ((t - 0.6) / 0.38).clamp(0, 1)

    def test_a_range_from_0_needs_no_floor(self) -> None:
        whole = AlphaTime(low=0.0, high=0.5, uniform_floor=0.0)
        assert (
            FlowConfig(curriculum=(TimeStage(steps=10, time=whole),), time=whole).curriculum[0].time
            == whole
        )


def test_stages_follow_each_other() -> None:
    narrow, wide = AlphaTime(low=0.8, high=1.0), AlphaTime(low=0.5, high=1.0)
    config = FlowConfig(
        curriculum=(TimeStage(steps=10, time=narrow), TimeStage(fraction=0.5, time=wide)),
        time=LogSNRTime(),
    )
    assert [time_config(config, step, 100) for step in (0, 9, 10, 49, 50)] == [
        narrow,
        narrow,
        wide,
        wide,
        LogSNRTime(),
    ]
    with pytest.raises(ValueError, match="one after the other"):
        FlowConfig(curriculum=(TimeStage(steps=10, time=narrow), TimeStage(steps=10, time=wide)))
    with pytest.raises(ValueError, match="either steps or fraction"):
        TimeStage(time=narrow)


def test_the_logs_curriculum_is_biased_and_still_starts_at_0() -> None:
    """First 30k steps biased to alpha > 0.8."""
    config = FlowConfig(curriculum=(TimeStage(steps=30_000, time=AlphaTime(low=0.8, high=1.0)),))
    u = torch.linspace(0, 1, POINTS + 1)[:-1]
    early, late = (
        training_times(time_config(config, step, 100_000), u) for step in (29_999, 30_000)
    )
    assert float((early >= 0.8).float().mean()) == pytest.approx(0.84, abs=0.01)
    assert float((late >= 0.8).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((early < 0.1).float().mean()) == pytest.approx(0.02, abs=0.002)


def test_every_member_has_its_contract_test() -> None:
    assert {type(cls.config) for cls in TimeSamplerContract.__subclasses__()} == set(
        members(TimeConfig)
    )


@pytest.mark.parametrize("fraction", [0.07, 0.14, 0.28, 0.29, 0.55, 0.57, 0.58])
def test_a_share_of_the_steps_ends_where_it_says(fraction: float) -> None:
    """0.07 of 100 steps is 7, though 0.07 * 100 is more, and 0.29 * 100 less than 29."""
    config = FlowConfig(curriculum=(TimeStage(fraction=fraction, time=AlphaTime(low=0.0)),))
    in_force = [time_config(config, step, 100).kind for step in range(100)]
    steps = round(100 * fraction)
    assert in_force == ["alpha"] * steps + ["uniform"] * (100 - steps)
