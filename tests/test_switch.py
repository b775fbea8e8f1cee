import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, get_scheduler

from superpose import InputError
from superpose.engines.switch import restarted
from superpose.experiment.train import train

EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


def arguments(tmp_path, **given):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("cosine", {}), ("warmup_stable_decay", {"num_decay_steps": 10}), ("constant_with_warmup", {})]
)
def test_a_restarted_schedule_is_that_of_each_stage(tmp_path, name, kwargs):
    given = arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=0.1)
    found = [restarted(given, [20, 30])(step) for step in range(51)]
    expected = []
    for steps in (20, 30):
        own = {"num_decay_steps": steps // 5} if kwargs else {}
        nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        alone = get_scheduler(name, nothing, math.ceil(0.1 * steps), steps, own).lr_lambdas[0]
        expected += [alone(step) for step in range(steps + (steps == 30))]
    assert found == expected


def test_a_schedule_that_listens_to_the_loss_cannot_restart(tmp_path):
    given = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    with pytest.raises(InputError, match="cannot start anew"):
        restarted(given, [20, 30])


def at_the_switch(recipe, out, *resets):
    """Weights and optimizer of the checkpoint at the switch, after step 8."""
    changed = recipe.replace("superposition", at_switch=resets).replace(
        "training", arguments={**recipe.training.arguments, "save_steps": 8}
    )
    train(changed, out)
    checkpoint = out / "checkpoint-8"
    return load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "optimizer.pt")["state"]


def test_resets_happen_at_the_switch_and_touch_what_they_name(recipe, tmp_path):
    weights, moments = at_the_switch(recipe, tmp_path / "none")
    assert all(state["exp_avg_sq"].any() and state["step"] == 8 for state in moments.values())

    same, zeroed = at_the_switch(recipe, tmp_path / "optimizer", "reset-optimizer")
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    assert not any(value.any() for state in zeroed.values() for value in state.values())

    new, partly = at_the_switch(recipe, tmp_path / "embeddings", "reinitialise")
    assert {name for name, weight in weights.items() if not torch.equal(new[name], weight)} == EMBEDDINGS
    assert all(new[name].std().item() == pytest.approx(0.02, rel=0.05) for name in EMBEDDINGS)
    assert not torch.equal(*(new[name] for name in EMBEDDINGS))
    assert sum(state["step"].item() == 0 for state in partly.values()) == 2
    again, _ = at_the_switch(recipe, tmp_path / "again", "reinitialise")
    assert all(torch.equal(again[name], weight) for name, weight in new.items())
