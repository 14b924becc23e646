"""Checkpoints that are written while training goes on: each is of its step, whatever changes meanwhile."""

import shutil
import threading

import torch
import torch.distributed.checkpoint as dcp

from rlhf_trainer.training import checkpoint


def test_what_is_saved_in_the_background_is_of_its_step(tmp_path, monkeypatch):
    """Training changes weights and optimizer while they are written, and waits for that before it saves again."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    may_write, background, write = threading.Event(), checkpoint.Background(), dcp.FileSystemWriter.write_data

    def write_later(*arguments):
        assert may_write.wait(60)
        return write(*arguments)

    def update():
        optimizer.zero_grad()
        model(torch.ones(3)).square().sum().backward()
        optimizer.step()

    update()
    then = [weight.detach().clone() for weight in model.parameters()]
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_later)
    checkpoint.save_checkpoint(tmp_path, 1, model, optimizer, {}, background)
    update()
    assert checkpoint.newest_checkpoint(tmp_path) is None
    may_write.set()
    checkpoint.save_checkpoint(tmp_path, 2, model, optimizer, {}, background)
    background.wait()
    assert [step.name for step in checkpoint.saved_checkpoints(tmp_path)] == ["step-000000001", "step-000000002"]
    last = [weight.detach().clone() for weight in model.parameters()]

    shutil.rmtree(tmp_path / checkpoint.FOLDER / "step-000000002")
    checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path), model, optimizer)
    assert all(map(torch.equal, model.parameters(), then))
    update()  # from the optimizer's state of then
    assert all(map(torch.equal, model.parameters(), last))
