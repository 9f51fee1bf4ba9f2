"""The number format "auto": bfloat16 where the processor computes in it, float32 elsewhere."""

from dataclasses import dataclass

import pytest
import torch

from companion import parameters
from companion.models.checkpoint import load
from companion.parameters import Parameters, autocast_dtype, param, resolve, resolve_autocast
from companion.training.loop import TrainConfig


def processor(monkeypatch, avx512_bf16=False, amx=False, cuda_bf16=None):
    """Pretend to be a machine: a CPU with or without bfloat16, and one CUDA device unless cuda_bf16 is None."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_bf16 is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda_bf16 is not None))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: cuda_bf16)


@pytest.mark.parametrize(
    "machine, device, expected",
    [
        ({}, "cpu", None),
        ({"avx512_bf16": True}, "cpu", "bfloat16"),
        ({"amx": True}, "auto", "bfloat16"),
        ({"cuda_bf16": True}, "auto", "bfloat16"),
        ({"cuda_bf16": True}, "cpu", None),
        ({"cuda_bf16": False, "avx512_bf16": True}, "cuda:0", None),
        ({"avx512_bf16": True}, "meta", None),
    ],
)
def test_auto_is_what_the_device_is_fast_in(monkeypatch, machine, device, expected):
    processor(monkeypatch, **machine)
    assert resolve_autocast("auto", device) == expected
    assert autocast_dtype("auto", device) == (expected and torch.bfloat16)
    assert resolve_autocast(None, device) is None and resolve_autocast("bfloat16", device) == "bfloat16"


@dataclass(frozen=True)
class Form(Parameters):
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


def test_a_notebook_gets_and_records_the_resolved_format(monkeypatch, capsys):
    cell = {"seed": 0, "device": "auto", "out": "runs/x", "autocast": "auto"}
    processor(monkeypatch)
    assert resolve(Form, cell).autocast is None
    assert resolve(Form, cell | {"autocast": "bfloat16"}).autocast == "bfloat16"
    processor(monkeypatch, amx=True)
    assert resolve(Form, cell).autocast == "bfloat16"
    with pytest.raises(ValueError, match="float16"):
        resolve(Form, cell | {"autocast": "float16"})


def test_a_loaded_denoiser_follows(monkeypatch):
    processor(monkeypatch)
    assert load("brain/t1w", autocast="auto").D.autocast is None
    processor(monkeypatch, avx512_bf16=True)
    assert load("brain/t1w", autocast="auto").D.autocast == torch.bfloat16


def test_training_takes_auto_and_refuses_other_formats():
    assert TrainConfig(autocast="auto").autocast == "auto"
    with pytest.raises(ValueError, match="float16"):
        TrainConfig(autocast="float16")


def test_every_form_leaves_the_format_to_the_processor():
    import companion.papers.aid.prior
    import companion.papers.aid.reconstruct
    import companion.papers.aid.sample
    import companion.papers.latent3d.autoencoder
    import companion.papers.latent3d.reconstruct
    import companion.papers.latent3d.sample
    import companion.papers.lmi.people
    import companion.papers.lmi.prior
    import companion.papers.lmi.sample
    import companion.papers.pet.prior
    import companion.papers.pet.sample
    import companion.papers.pet.study
    import companion.papers.start_here
    import companion.papers.train_prior  # noqa: F401

    forms = [c for c in every_subclass(parameters.Parameters) if c.__module__.startswith("companion.")]
    formats = {c: c.__dataclass_fields__["autocast"].default for c in forms if "autocast" in c.__dataclass_fields__}
    assert len(formats) >= 14 and set(formats.values()) == {"auto"}


def every_subclass(cls):
    """`cls`'s subclasses, and theirs."""
    return [d for c in cls.__subclasses__() for d in (c, *every_subclass(c))]
