import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superpose import Schedule, Stage

STAGED = Schedule.staged(
    [Stage(3, 8), Stage(5, 4, "input-only", "power-law"), Stage(2, 2, "output-only", (3.63, 1.35, -1.25)), Stage(7)]
)
GRADUAL = Schedule.tst(9, 4, 0.3, final_weighting="first")


def test_tst_switches_after_the_ratio_of_the_steps():
    schedule = Schedule.tst(20_000, 6, 0.3)
    assert schedule.switches == [6000]
    assert schedule.stage_at(5999).bag_size == 6
    assert schedule.stage_at(6000).bag_size == 1
    assert schedule.steps == 20_000


def test_a_cut_is_a_switch_and_no_change():
    schedule = Schedule.staged([Stage(2, 4), Stage(3, 4), Stage(1, 4, mode="output-only"), Stage(4), Stage(5)])
    assert schedule.switches == [2, 5, 6, 10]
    assert schedule.changes == [5, 6]


def test_data_tokens_are_the_papers_formula():
    baseline = Schedule.baseline(20_000).data_tokens(2048, 1024)
    assert baseline == 20_000 * 2048 * 1024  # 42B, table 1
    assert Schedule.tst(20_000, 6, 0.3).data_tokens(2048, 1024) == pytest.approx((1 + 0.3 * 5) * baseline)  # 105B
    assert Schedule.tst(20_000, 6, 0.3).positions(2048, 1024) == baseline


@pytest.mark.parametrize(
    "schedule", [Schedule.baseline(9), Schedule.tst(9, 4, 1 / 3), STAGED, Schedule.patch_level(9, 4, 2 / 3)]
)
def test_offsets_are_the_sums_over_the_steps_before(schedule):
    tokens = positions = 0
    flops = 0.0
    for step in range(schedule.steps):
        assert schedule.token_offset(step, 16, 3) == tokens
        assert schedule.position_offset(step, 16, 3) == positions
        assert schedule.flops_before(step, 16, 3, lambda length: 100.0 + length) == pytest.approx(flops)
        stage = schedule.stage_at(step)
        tokens += 3 * stage.window(16)
        positions += 3 * stage.positions(16)
        flops += 3 * stage.positions(16) * (100.0 + stage.positions(16))
    assert (schedule.data_tokens(16, 3), schedule.positions(16, 3)) == (tokens, positions)
    assert schedule.flops(16, 3, lambda length: 100.0 + length) == pytest.approx(flops)


def test_modes_say_which_side_is_superposed():
    full, input_only, output_only = (Stage(1, 4, mode) for mode in ("full", "input-only", "output-only"))
    assert [(s.input_bag, s.target_bag, s.window(10)) for s in (full, input_only, output_only)] == [
        (4, 4, 40),
        (4, 1, 40),
        (1, 4, 10),
    ]


def test_patch_level_keeps_the_data_and_cuts_the_positions():
    patch, plain = Schedule.patch_level(300, 4, 2 / 3), Schedule.baseline(300)
    assert patch.data_tokens(64, 2) == plain.data_tokens(64, 2)
    assert patch.positions(64, 2) == plain.positions(64, 2) // 2  # the paper's half of the cost
    with pytest.raises(ValueError, match="multiple of position_divisor"):
        patch.positions(63, 2)


@given(steps=st.integers(1, 500), ratio=st.floats(0, 1), bag_size=st.integers(1, 16))
def test_stages_cover_every_step_once(steps, ratio, bag_size):
    schedule = Schedule.tst(steps, bag_size, ratio)
    assert schedule.steps == steps
    assert abs(sum(s.steps for s in schedule.stages if s.superposed) - ratio * steps) <= 0.5 or bag_size == 1
    assert all(stage.steps for stage in schedule.stages)


def test_edges_of_the_ratio():
    assert Schedule.tst(10, 4, 0.0) == Schedule.baseline(10)
    assert Schedule.tst(10, 4, 1.0).stages == (Stage(10, 4),)


def test_weights_move_over_their_stage():
    schedule = Schedule.tst(20, 4, 0.5, final_weighting="first")
    assert torch.allclose(schedule.position_weights_at(0), torch.full((4,), 0.25))
    assert torch.equal(schedule.position_weights_at(9), torch.tensor([1.0, 0, 0, 0]))
    middle = schedule.position_weights_at(3)
    assert torch.allclose(middle, torch.tensor([0.5, *[1 / 6] * 3]))
    assert schedule.position_weights_at(10) is None
    assert Schedule.tst(20, 4, 0.5).position_weights_at(0) is None
    assert Schedule.tst(20, 4, 0.5, mode="input-only", weighting="first").position_weights_at(0) is None


@pytest.mark.parametrize("schedule", [Schedule.baseline(9), Schedule.tst(9, 4, 0.3, weighting="power-law"), GRADUAL, STAGED])
def test_toml_round_trip(schedule):
    assert Schedule.from_toml(schedule.to_toml()) == schedule


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]"):
        Schedule.tst(10, 4, 1.5)
    with pytest.raises(ValueError, match="bag_size"):
        Schedule.tst(10, 0, 0.5)
    with pytest.raises(ValueError, match="steps"):
        Schedule.baseline(0)
    with pytest.raises(ValueError, match="mode"):
        Stage(1, 4, "half")
    with pytest.raises(ValueError, match="weighting"):
        Stage(1, 4, weighting="linear")
    with pytest.raises(IndexError):
        Schedule.baseline(10).stage_at(10)
