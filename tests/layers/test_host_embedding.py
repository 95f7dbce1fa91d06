"""Embeddings that stay on the host: which do, what is the same as before, and what no ``.to`` moves."""

import copy
import re
import sys

import pytest
import torch
from torch import nn

from lowprec import ops
from lowprec.adapter import Lora
from lowprec.layers.host_embedding import HostEmbedding, host_tables, keep_on_host, put_on_host
from lowprec.lora import fuse
from lowprec.testing import tiny_model

IDS = torch.arange(12).view(2, 6)
CUDA = torch.device("cuda")


def adapted(arch: str = "llama", **keys):
    return Lora(r=4).attach(tiny_model(arch, **({"tie_word_embeddings": False} | keys)))


def test_the_model_computes_the_same_bits_and_keeps_its_keys():
    model = adapted()
    logits, keys = model(input_ids=IDS).logits, list(model.state_dict())
    answer = model.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False)
    saved = copy.deepcopy(model.state_dict())
    assert put_on_host(model, pin=False) is None
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding) and not table.weight.requires_grad
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False), answer)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        table.weight.zero_()
    model.load_state_dict(saved)
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert "14 of 14" in fuse(model).summary()


def test_the_device_of_the_model_is_that_of_its_parameters():
    model = adapted()
    put_on_host(model, pin=False)
    assert all(p is not table for p in model.parameters() for table in host_tables(model))
    model.to("meta")
    assert next(model.parameters()).device.type == model.device.type == "meta"
    assert [table.device.type for table in host_tables(model)] == ["cpu"]


def test_dtypes_change_and_devices_do_not():
    embedding = HostEmbedding(nn.Embedding(5, 8, padding_idx=1), pin=False)
    expected = embedding.weight.clone()
    assert torch.equal(embedding.to("meta").weight, expected)
    assert embedding.to("meta", torch.bfloat16).weight.dtype == torch.bfloat16
    assert embedding.weight.device.type == "cpu" and torch.equal(embedding.weight, expected.bfloat16())
    assert embedding.float().weight.dtype == torch.float32 and not list(embedding.parameters())
    assert copy.deepcopy(embedding)(torch.tensor([1])).shape == (1, 8)


def with_table(model, **keys):
    model.set_input_embeddings(nn.Embedding(272, 64, **keys).requires_grad_(False))
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: adapted(tie_word_embeddings=True), "tied to the output head"),
        (lambda: adapted("gpt2", tie_word_embeddings=True), "tied to the output head"),
        (lambda: adapted("gemma", tie_word_embeddings=True), "Embedding|tied"),
        (lambda: tiny_model("llama", tie_word_embeddings=False), "are trained"),
        (lambda: Lora(r=4, modules_to_save=["embed_tokens"]).attach(tiny_model("llama")), "ModulesToSaveWrapper"),
        (lambda: Lora(r=4, target_modules=["embed_tokens", "q_proj"]).attach(tiny_model("llama")), "are a Embedding"),
        (lambda: with_table(tiny_model("llama"), max_norm=1.0), "max_norm"),
    ],
)
def test_what_cannot_stay_on_the_host_is_told_and_not_moved(model, reason):
    model = model()
    table = model.get_input_embeddings()
    told = put_on_host(model, pin=False)
    assert told is not None and re.search(reason, told), told
    assert model.get_input_embeddings() is table and not host_tables(model)


def test_on_a_processor_there_is_nothing_to_offload():
    model = adapted()
    assert "nothing to offload on a processor" in keep_on_host(model, torch.device("cpu"))
    assert not host_tables(model)


def test_the_note_names_the_key_and_the_reason():
    told = keep_on_host(adapted(tie_word_embeddings=True), CUDA)
    assert told.startswith("train.offload_embeddings=true moved nothing: the token embeddings are tied to the output")


def test_a_table_that_is_not_pinned_is_not_read_by_the_kernel(monkeypatch):
    module = sys.modules["lowprec.ops.gather_host_rows"]
    monkeypatch.setattr(module, "no_triton", lambda device: None)
    assert "not pinned" in module.BACKENDS[0].why_not(IDS, torch.randn(12, 4))
    assert torch.equal(ops.gather_host_rows(IDS, torch.eye(12))[1, 2], torch.eye(12)[8])


@pytest.mark.gpu
@pytest.mark.parametrize("start", ["cpu", "cuda"])
def test_on_a_gpu_the_table_is_pinned_and_its_copy_there_freed(start):
    model = adapted(vocab_size=65536).to(start)  # 16 MiB
    table = model.get_input_embeddings().weight
    nbytes, expected = table.nbytes, table.detach().cpu().clone()
    del table
    before = torch.cuda.memory_allocated()
    assert "stay in pinned host memory" in keep_on_host(model, CUDA)
    assert before - torch.cuda.memory_allocated() == (nbytes if start == "cuda" else 0)
    model.to("cuda").cuda().to(torch.bfloat16)
    (table,) = host_tables(model)
    assert table.is_pinned() and torch.equal(table, expected.bfloat16())
    assert model.device.type == "cuda"
    ids = IDS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model.get_input_embeddings()(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda and torch.equal(found.cpu(), expected.bfloat16()[IDS])
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).is_cuda
