"""Full fine-tuning of a 12-layer model on the CPU, by the paths that a large model takes on a GPU and a disk."""

import pytest
import torch

from lowprec.optim import AdamW
from lowprec.testing import tiny_model
from tests.optim.training import same

TEXT = torch.tensor(list((__doc__ * 40).encode())[: 64 * 40]).view(40, 64)


def model():
    return tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=12, tie_word_embeddings=True).train()


def steps(network, optimizer, start, stop, clip=None):
    losses = []
    for step in range(start, stop):
        batch = TEXT[step % 40 : step % 40 + 2]
        loss = network(input_ids=batch, labels=batch).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(network):
    return [param.detach().clone() for param in network.parameters()]


def test_disk_and_memory_give_the_same_model_and_the_run_resumes(tmp_path):
    disk = {"state_store": "ssd", "path": tmp_path / "states", "chunk_bytes": 100_000, "pinned_gib": 0.002}
    for state_dtype, clip in (("fp32", None), ("int8", 1.0)):  # without clipping the update runs in backward
        expected = model()
        losses = steps(expected, AdamW(expected.named_parameters(), lr=3e-3, state_dtype=state_dtype), 0, 10, clip)
        assert losses[-1] < losses[0]

        network = model()
        optimizer = AdamW(network.named_parameters(), lr=3e-3, state_dtype=state_dtype, **disk)
        if clip is None:
            optimizer.update_in_backward()
        steps(network, optimizer, 0, 5, clip)
        folder = tmp_path / f"{state_dtype}-{clip}"
        optimizer.save_states(folder)
        optimizer.close()
        facts = optimizer.statistics()
        assert facts["bytes_per_parameter"] == pytest.approx(10 if state_dtype == "fp32" else 4.03125, rel=1e-3)
        assert facts["written_gb"] * 1e9 >= 5 * facts["states_gib"] * 2**30

        resumed = AdamW(network.named_parameters(), state_dtype=state_dtype, **disk)
        resumed.load_states(folder)
        steps(network, resumed, 5, 10, clip)
        resumed.close()
        assert same(weights(network), weights(expected)), (state_dtype, clip)
