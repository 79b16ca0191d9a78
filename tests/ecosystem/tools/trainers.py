"""Trainers: accelerate and Lightning."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from ecosystem.harness import Case, evaluated, group, loss_of, parametrised
from torch import Tensor
from torch.utils.data import DataLoader

tool = group("Trainers")


@tool("accelerate: `cpu_offload`")
def offload(case: Case) -> Any:
    from accelerate import cpu_offload

    cpu_offload(case.model.eval(), execution_device=torch.device("cpu"))
    with torch.no_grad():
        return case.model(*case.batch())


@tool("accelerate: `disk_offload`", on=parametrised)
def disk(case: Case) -> Any:
    from accelerate import disk_offload

    disk_offload(case.model.eval(), str(case.folder), execution_device=torch.device("cpu"))
    with torch.no_grad():
        return case.model(*case.batch())


@tool("accelerate: `prepare`, `accumulate`, `backward`", on=parametrised)
def prepare(case: Case) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(case.model.train(), optimizer)
    for number in range(4):
        torch.manual_seed(number)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(*case.batch(number))))
            optimizer.step()
            optimizer.zero_grad()
    case.model = accelerator.unwrap_model(model)
    accelerator.free_memory()
    return evaluated(case)


def fit(case: Case, **options: Any) -> Any:
    """Four steps by Lightning's own loop; the trainer."""
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def training_step(self, batch: Any, number: int) -> Tensor:
            torch.manual_seed(number)
            return loss_of(self.model(*batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    batches = DataLoader([case.batch(number) for number in range(2)], batch_size=None)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=case.folder,
            **options,
        )
        task = Task()
        trainer.fit(task, batches)
    return task, trainer


@tool("Lightning: `Trainer.fit`, `ModelCheckpoint`, resumed from its file", on=parametrised)
def checkpointed(case: Case) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(case.folder / "kept", save_last=True)
    fit(case, callbacks=[keep])
    state = torch.load(keep.last_model_path, weights_only=True)["state_dict"]
    case.model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return evaluated(case)


@tool("Lightning: `EMAWeightAveraging`", on=parametrised)
def averaged(case: Case) -> Any:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    task, _ = fit(case, callbacks=[EMAWeightAveraging(decay=0.5)], enable_checkpointing=False)
    case.model = task.model
    return evaluated(case)


@tool("Lightning: `gradient_clip_val`, `precision='bf16-mixed'`", on=parametrised, tolerance=6e-2, single=True)
def mixed(case: Case) -> Any:
    fit(case, gradient_clip_val=0.5, precision="bf16-mixed", enable_checkpointing=False)
    return evaluated(case)
