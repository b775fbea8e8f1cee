import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import superpose
from superpose import Schedule, ScheduledTokens, Stage, bag_mean, bags, reference

VOCABULARY = 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "olmo2": {},
    "gemma2": {"final_logit_softcapping": 0.3},  # a cap that these logits feel
    "gemma3_text": {},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "smollm3": {},
    "granite": {"logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.5},
    "phi": {},
}
#: Their logits are not the head's product alone: a soft-cap, a bias.
FULL_LOGITS = {"phi"}


def build(name="llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config).train()


def ids(*shape, seed=1):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def step(model, **inputs):
    torch.manual_seed(2)  # dropout
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_both_steps(name):
    model = build(name)
    keys, stock = list(model.state_dict()), type(model)
    plain = ids(2, 16)
    expected, expected_gradients = step(model, input_ids=plain, labels=plain)
    superpose.attach(model)

    found, found_gradients = step(model, input_ids=plain, labels=plain)
    assert (found.logits is None) == (name not in FULL_LOGITS)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-4, atol=1e-6)

    folded = ids(2, 16, 4)
    bagged, bagged_gradients = step(model, input_ids=folded, labels=folded)
    assert bagged.loss.item() == pytest.approx(math.log(VOCABULARY), rel=0.06)
    # A key's bias shifts all scores of a query alike: its gradient is rounding noise in both steps.
    reached = {n for n, g in expected_gradients.items() if g.abs().max() > 0 and "k_proj.bias" not in n}
    assert reached <= {n for n, g in bagged_gradients.items() if g.abs().max() > 0}
    assert all(g.isfinite().all() for g in bagged_gradients.values())

    model.eval()
    assert model(input_ids=plain, labels=plain).logits.shape == (2, 16, VOCABULARY)
    assert list(model.state_dict()) == keys
    assert superpose.detach(model) is model
    assert type(model) is stock
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert type(model.get_input_embeddings()).forward is type(build(name).get_input_embeddings()).forward


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "granite", "gpt2"])
def test_a_superposed_step_is_the_reference_through_the_models_own_logits(name):
    model = build(name).eval()
    folded = ids(2, 8, 4)
    embedded = reference.bag_mean(model.get_input_embeddings().weight, folded)
    scale = getattr(model.get_input_embeddings(), "embed_scale", torch.tensor(1.0))
    logits = model(inputs_embeds=embedded * scale).logits
    expected = reference.multi_hot_cross_entropy(logits[:, :-1], folded[:, 1:])
    superpose.attach(model)
    assert model(input_ids=folded, labels=folded).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_auxiliary_loss_is_kept():
    with_router, without = build("mixtral"), build("mixtral", output_router_logits=False)
    folded = ids(2, 8, 4)
    losses = [superpose.attach(model)(input_ids=folded, labels=folded) for model in (with_router, without)]
    auxiliary = with_router.config.router_aux_loss_coef * losses[0].aux_loss
    assert auxiliary.item() > 1e-3
    assert losses[0].loss.item() == pytest.approx((losses[1].loss + auxiliary).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "mamba2", "gpt2"])
def test_no_output_sees_a_later_bag(name):
    model = superpose.attach(build(name).eval())
    folded = ids(1, 8, 4)
    with torch.no_grad():
        before = model(input_ids=folded).logits
        for changed in range(1, 8):
            other = folded.clone()
            other[:, changed] = ids(1, 4, seed=9)
            after = model(input_ids=other).logits
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert not torch.equal(after[:, changed], before[:, changed])


STAGES = [Stage(1), Stage(1, 4), Stage(1, 8, weighting="power-law"), Stage(1, 4, "input-only"), Stage(1, 4, "output-only")]


@pytest.mark.parametrize("sum_to_one", [False, True])
def test_every_stage_starts_near_the_logarithm_of_the_vocabulary(store, sum_to_one):
    model = superpose.attach(build(vocab_size=257), sum_to_one=sum_to_one)
    data = ScheduledTokens(store, Schedule.staged(STAGES), positions=32, sequences_per_step=2)
    for number in range(len(STAGES)):
        batch = {name: value.unsqueeze(0) for name, value in data[2 * number].items()}
        assert model(**batch).loss.item() == pytest.approx(math.log(257), rel=0.05)


def test_position_weights_reach_the_loss():
    model, folded = superpose.attach(build()), ids(2, 8, 4)
    first = model(input_ids=folded, labels=folded, position_weights=bags.position_weights("first", 4).expand(2, 4)).loss
    only = model(input_ids=folded, labels=folded[..., 0]).loss
    assert first.item() == pytest.approx(only.item(), rel=1e-6)
    assert first.item() != pytest.approx(model(input_ids=folded, labels=folded).loss.item(), rel=1e-6)


def test_ignored_labels():
    model, folded = superpose.attach(build()), ids(2, 8, 4)
    labels = folded.clone()
    labels[:, :4] = -100
    logits = (
        superpose.detach(copy.deepcopy(model))
        .eval()(inputs_embeds=bag_mean(model.get_input_embeddings().weight, folded))
        .logits
    )
    expected = reference.multi_hot_cross_entropy(logits[:, 3:-1], folded[:, 4:])
    assert model(input_ids=folded, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_and_generation_are_the_stock_models(tmp_path):
    model, plain = build().eval(), ids(1, 5)
    expected = model(input_ids=plain, labels=plain)
    text = model.generate(plain, max_new_tokens=5, do_sample=False)
    superpose.attach(model)
    found = model(input_ids=plain, labels=plain)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(model.generate(plain, max_new_tokens=5, do_sample=False), text)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__ == "transformers.models.llama.modeling_llama"
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded(input_ids=plain).logits, expected.logits)


def test_tied_weights_get_both_gradients():
    model, folded = build(tie_word_embeddings=True), ids(2, 8, 4)
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    superpose.attach(model)
    _, found = step(model, input_ids=folded, labels=folded)
    superpose.detach(model).zero_grad()
    logits = model(inputs_embeds=bag_mean(weight, folded)).logits[:, :-1].flatten(0, 1)
    loss = torch.stack([cross_entropy(logits, folded[:, 1:, i].flatten()) for i in range(4)]).mean()
    loss.backward()
    torch.testing.assert_close(found["model.embed_tokens.weight"], weight.grad, rtol=1e-4, atol=1e-6)


def test_compiled_model_gives_the_same_loss():
    model, folded = superpose.attach(build()), ids(2, 8, 4)
    expected, gradients = step(model, input_ids=folded, labels=folded)
    found, compiled_gradients = step(torch.compile(model, backend="aot_eager"), input_ids=folded, labels=folded)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, folded = superpose.attach(build()), ids(2, 8, 4)
    _, expected = step(model, input_ids=folded, labels=folded)
    model.gradient_checkpointing_enable()
    _, found = step(model, input_ids=folded, labels=folded)
    torch.testing.assert_close(found, expected)


def test_attach_and_detach_refuse_what_they_cannot_do():
    model = build()
    with pytest.raises(ValueError, match="not attached"):
        superpose.detach(model)
    superpose.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        superpose.attach(model)
    with pytest.raises(ValueError, match="has no output head"):
        superpose.attach(build().model)
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=ids(2, 8, 4), labels=ids(2, 7, 4))


def test_stock_trainer_trains_an_attached_model(store, tmp_path):
    schedule = Schedule.tst(6, 4, 0.5)
    data = ScheduledTokens(store, schedule, positions=32, sequences_per_step=4)

    def weights(micro, accumulate):
        model = superpose.attach(build(vocab_size=257))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        assert trainer.state.global_step == schedule.steps
        return model.state_dict()

    torch.testing.assert_close(weights(1, 4), weights(4, 1), rtol=1e-3, atol=2e-5)


def test_a_shuffled_stock_trainer_is_refused(store, tmp_path):
    data = ScheduledTokens(store, Schedule.tst(6, 4, 0.5), positions=32, sequences_per_step=4)
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True)
    with pytest.raises(superpose.InputError, match="sequential"):
        Trainer(superpose.attach(build(vocab_size=257)), arguments, train_dataset=data).train()
