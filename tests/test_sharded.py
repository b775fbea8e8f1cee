"""The loss with a sharded head, on two gloo ranks against one process with the whole of everything."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import superpose
from superpose import linear_multi_hot_cross_entropy, loss

RANKS, WIDTH, ROWS, BAG = 2, 8, 12, 3
OPTIONS = [{}, {"sum_to_one": True, "soft_cap": 2.0, "z_loss": 0.1}, {"reduction": "none"}]


def problem(vocabulary):
    torch.manual_seed(0)
    hidden = torch.randn(2, ROWS // 2, WIDTH)
    head = torch.randn(vocabulary, WIDTH)
    targets = torch.randint(vocabulary, (2, ROWS // 2, BAG))
    targets[0, 0], targets[0, 1], targets[1, 2, 1:] = 3, -100, -100
    targets[1, 0] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    return hidden, head, targets, torch.rand(BAG) + 0.1


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=41,  # the last rank's share is shorter
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def batch():
    return torch.randint(41, (4, 6, BAG), generator=torch.Generator().manual_seed(2))


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def close(found, expected):
    torch.testing.assert_close(whole(found).detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def vocabulary_parallel(directory):
    mesh = init_device_mesh("cpu", (RANKS,))
    for vocabulary in (20, 21):
        for options in OPTIONS:
            for placement in (Replicate(), Shard(1)):  # Shard(1): sequence parallelism
                hidden, head, targets, weights = problem(vocabulary)
                sharded = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
                inputs = distribute_tensor(hidden, mesh, [placement]).requires_grad_()
                found = linear_multi_hot_cross_entropy(inputs, sharded, targets, weights=weights, **options)
                upstream = torch.linspace(0.5, 1.5, max(found.numel(), 1)).view(found.shape)
                (found.full_tensor() * upstream).sum().backward()
                hidden.requires_grad_(), head.requires_grad_()
                expected = linear_multi_hot_cross_entropy(hidden, head, targets, weights=weights, **options)
                (expected * upstream).sum().backward()
                close(found, expected)
                close(inputs.grad, hidden.grad)
                close(sharded.grad, head.grad)
                assert inputs.grad.placements == (placement,)


def several_chunks(directory):
    stock, loss._rows_per_chunk = loss._rows_per_chunk, lambda vocabulary, device: 5
    try:
        vocabulary_parallel(directory)
    finally:
        loss._rows_per_chunk = stock


def fsdp2(directory):
    mesh = init_device_mesh("cpu", (RANKS,))
    rank = dist.get_rank()
    folded = batch()
    reference = superpose.attach(llama())
    expected = reference(input_ids=folded, labels=folded).loss
    expected.backward()
    for head_alone in (False, True):
        for reshard in (False, True):
            model = superpose.attach(llama())
            if head_alone:
                fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
            mine = folded.chunk(RANKS)[rank]
            for repetition in range(2):  # the second finds what the first left behind
                model.zero_grad()
                found = model(input_ids=mine, labels=mine).loss
                found.backward()
                mean = found.detach().clone()
                dist.all_reduce(mean)
                close(mean / RANKS, expected)
                for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
                    assert isinstance(ours.grad, DTensor), (name, repetition)
                    close(ours.grad, theirs.grad)


def tensor_parallel_transformers(directory):
    folded = batch()
    reference = superpose.attach(llama())
    expected = reference(input_ids=folded, labels=folded).loss
    expected.backward()
    model = LlamaForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=RANKS)).train()
    plain = model(input_ids=folded[..., 0]).logits
    superpose.attach(model)
    assert isinstance(model.lm_head.weight, DTensor)
    output = model(input_ids=folded, labels=folded)
    assert output.logits is None
    close(output.loss, expected)
    output.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None, name
        close(ours.grad, theirs.grad)
    superpose.detach(model)
    torch.testing.assert_close(model(input_ids=folded[..., 0]).logits, plain)


def refusals(directory):
    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, head, targets, _ = problem(20)
    sharded = distribute_tensor(head, mesh, [Shard(0)])
    inputs = distribute_tensor(hidden, mesh, [Replicate()])
    with pytest.raises(ValueError, match="hidden is not"):
        linear_multi_hot_cross_entropy(hidden, sharded, targets)
    with pytest.raises(ValueError, match="placements"):
        linear_multi_hot_cross_entropy(inputs, distribute_tensor(head, mesh, [Shard(1)]), targets)
    with pytest.raises(ValueError, match="without a token"):
        linear_multi_hot_cross_entropy(inputs, distribute_tensor(head[:1], mesh, [Shard(0)]), targets)


CASES = [vocabulary_parallel, several_chunks, fsdp2, tensor_parallel_transformers, refusals]


def rank_main(rank, directory, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for case in CASES:
        try:
            case(directory)
        except BaseException as error:
            raise RuntimeError(f"{case.__name__} on rank {rank}") from error
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    mp.spawn(rank_main, (str(tmp_path / "model"), str(tmp_path / "rendezvous")), nprocs=RANKS)
