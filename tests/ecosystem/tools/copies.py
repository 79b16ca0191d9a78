"""Copies of a model, on disk and in memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from ecosystem.harness import Case, evaluated, group, parametrised, train

tool = group("Copies and checkpoints")


@tool("`copy.deepcopy` in the middle of training")
def deep(case: Case) -> Any:
    train(case)
    twin = Case(copy.deepcopy(case.model), case.subject, case.folder)
    return [train(twin), evaluated(case)]


@tool("`pickle` of the whole model")
def pickled(case: Case) -> Any:
    train(case)
    return train(Case(pickle.loads(pickle.dumps(case.model)), case.subject, case.folder))


@tool("`torch.save(model)`, `torch.load(weights_only=False)`")
def saved_whole(case: Case) -> Any:
    train(case)
    torch.save(case.model, case.folder / "model.pt")
    return train(Case(torch.load(case.folder / "model.pt", weights_only=False), case.subject, case.folder))


@tool("`torch.save(state_dict)`, `torch.load(weights_only=True)`")
def saved_state(case: Case) -> Any:
    fresh = copy.deepcopy(case.model)
    train(case)
    torch.save(case.model.state_dict(), case.folder / "model.pt")
    fresh.load_state_dict(torch.load(case.folder / "model.pt", weights_only=True))
    return evaluated(Case(fresh, case.subject, case.folder))


@tool("the same, into a model made on the meta device (`assign=True`)")
def assigned(case: Case) -> Any:
    skeleton = copy.deepcopy(case.model).to("meta")
    train(case)
    skeleton.load_state_dict(case.model.state_dict(), assign=True)
    return evaluated(Case(skeleton, case.subject, case.folder))


@tool("`safetensors`: `save_model`, `load_model`", on=parametrised)
def safe(case: Case) -> Any:
    from safetensors.torch import load_model, save_model

    fresh = copy.deepcopy(case.model)
    train(case)
    save_model(case.model, str(case.folder / "model.safetensors"))
    load_model(fresh, str(case.folder / "model.safetensors"))
    return evaluated(Case(fresh, case.subject, case.folder))


@tool("`torch.distributed.checkpoint` state dicts of model and optimizer", on=parametrised)
def distributed_checkpoint(case: Case) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    fresh = Case(copy.deepcopy(case.model), case.subject, case.folder)
    optimizers = [torch.optim.SGD(one.model.parameters(), lr=0.01, momentum=0.9) for one in (case, fresh)]
    train(case, optimizer=optimizers[0])
    saved = dict(zip(("model", "optimizer"), get_state_dict(case.model, optimizers[0]), strict=True))
    dcp.save(saved, checkpoint_id=case.folder / "checkpoint", no_dist=True)
    found = dict(zip(("model", "optimizer"), get_state_dict(fresh.model, optimizers[1]), strict=True))
    dcp.load(found, checkpoint_id=case.folder / "checkpoint", no_dist=True)
    set_state_dict(fresh.model, optimizers[1], model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return train(fresh, optimizer=optimizers[1])
