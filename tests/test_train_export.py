"""Trained models go out: open_clip, safetensors and ONNX give the checkpoint's own embeddings, or say why not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train_weights import CLIP_SMALL, CONTEXT, SIZE, VOCAB

from pipeline.config import DataConfig
from shards.errors import InputError
from train.architecture import ModelConfig
from train.checkpoint import read_checkpoint, write_checkpoint
from train.commandline import to_fields
from train.config import TrainConfig
from train.export import ExportConfig, export, main
from train.model import ClipModel, build_model
from train.presets import CHEXZERO_MEAN, CHEXZERO_STD
from train.state import LEFT_OUT
from train.weights import load_pretrained

DINO_SMALL = replace(CLIP_SMALL, tower="vit_tiny_patch16_dinov3_qkvb", image_head="linear")
MLP_SMALL = replace(DINO_SMALL, image_head="mlp", text_head="mlp", head_width=64, head_dropout=0.1)
DATA = DataConfig(image_size=SIZE, mean=CHEXZERO_MEAN, std=CHEXZERO_STD)


def run_of(folder: Path, config: ModelConfig, *, average: bool = False) -> ClipModel:
    """A run's folder with a checkpoint of random weights; returns the model it holds."""
    torch.manual_seed(4)
    model = build_model(config, vocab_size=VOCAB, context=CONTEXT, image_size=SIZE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = model.state_dict()
    nothing = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    settings = to_fields(TrainConfig(shards=Path(), out=Path(), model=config, data=DATA))
    payload = {
        "step": 7,
        "config": {name: value for name, value in settings.items() if name not in LEFT_OUT},
        "fingerprint": {"tokenizer": "0" * 32},
        **({"model": nothing, "ema": state} if average else {"model": state}),
    }
    folder.mkdir()
    write_checkpoint(folder / "best.pt", payload)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (5, 3, SIZE, SIZE) and token ids (5, CONTEXT) that end at different places."""
    tokens = torch.randint(1, VOCAB - 1, (5, CONTEXT), generator=torch.Generator().manual_seed(1))
    for row in range(5):
        tokens[row, 4 + row], tokens[row, 5 + row :] = VOCAB - 1, 0
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)), tokens


def unit(values: torch.Tensor) -> np.ndarray:
    return F.normalize(values.detach(), dim=-1).numpy()


@pytest.mark.parametrize("config", [CLIP_SMALL, DINO_SMALL, replace(DINO_SMALL, image_head="mlp", head_width=64)])
def test_open_clip_loads_it_and_gives_the_same(config: ModelConfig, tmp_path: Path) -> None:
    model = run_of(tmp_path / "run", config, average=True)
    export(ExportConfig(checkpoint=tmp_path / "run", to="open_clip", out=tmp_path / "out"))
    name = f"local-dir:{tmp_path / 'out'}"
    theirs, preprocess = open_clip.create_model_from_pretrained(name)
    images, tokens = inputs()
    with torch.inference_mode():
        assert np.abs(unit(theirs.encode_image(images)) - unit(model.encode_image(images))).max() < 1e-5
        assert np.abs(unit(theirs.encode_text(tokens)) - unit(model.encode_text(tokens))).max() < 1e-5
    assert theirs.logit_scale.item() == model.logit_scale.item()
    assert open_clip.create_model(name).state_dict().keys() == theirs.state_dict().keys()
    # Their preprocessing is ours: the whole image to a square, and the run's own statistics.
    assert preprocess.transforms[0].size in (SIZE, (SIZE, SIZE), [SIZE, SIZE])
    assert preprocess.transforms[0].interpolation.value == "bicubic"
    assert preprocess.transforms[-1].mean == pytest.approx(CHEXZERO_MEAN)
    assert open_clip.get_tokenizer(name).context_length == CONTEXT


def test_what_went_out_comes_in(tmp_path: Path) -> None:
    """Every weight of both towers, heads included, through either format of ours."""
    for config, to, file in (
        (DINO_SMALL, "open_clip", "open_clip_model.safetensors"),
        (CLIP_SMALL, "open_clip", "open_clip_model.safetensors"),
        (MLP_SMALL, "safetensors", "model.safetensors"),
        (ModelConfig(), "safetensors", "model.safetensors"),
    ):
        folder = tmp_path / f"{config.tower}-{to}-{config.image_head}"
        model = run_of(folder, config)
        out = export(ExportConfig(checkpoint=folder, to=to, out=folder / "out"))  # type: ignore[arg-type]
        other = build_model(config, vocab_size=VOCAB, context=CONTEXT, image_size=SIZE)
        told = load_pretrained(
            other,
            TrainConfig(shards=Path(), out=Path(), vision_weights=str(out), text_weights=str(out / file)),
        )
        assert len(told) == 2
        for part in ("image", "text"):
            theirs = getattr(other, part).state_dict()
            assert all(torch.equal(theirs[n], t) for n, t in getattr(model, part).state_dict().items())


def test_safetensors_holds_every_weight_and_how_to_use_it(tmp_path: Path) -> None:
    model = run_of(tmp_path / "run", ModelConfig(), average=True)
    export(ExportConfig(checkpoint=tmp_path / "run", to="safetensors", out=tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ModelConfig(**{**about["model"], "widths": tuple(about["model"]["widths"])}) == ModelConfig()
    assert (about["step"], about["context"], about["preprocess"]["size"]) == (7, CONTEXT, SIZE)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}  # as any other file, for all whom the umask lets
    # The weights that the average was made of, on request.
    export(ExportConfig(checkpoint=tmp_path / "run", to="safetensors", out=tmp_path / "raw", weights="model"))
    assert not any(tensor.any() for tensor in load_file(tmp_path / "raw" / "model.safetensors").values())


def test_onnx_gives_the_same_for_any_number_of_rows(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    model = run_of(tmp_path / "run", CLIP_SMALL)
    export(ExportConfig(checkpoint=tmp_path / "run", to="onnx", out=tmp_path / "out"))
    images, tokens = inputs()
    for name, values, wanted in (
        ("image", images, model.encode_image(images)),
        ("text", tokens, model.encode_text(tokens)),
    ):
        session = runtime.InferenceSession(tmp_path / "out" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        for rows in (1, 5):
            (found,) = session.run(None, {entry.name: values[:rows].numpy()})
            assert np.abs(found - unit(wanted)[:rows]).max() < 1e-5
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["logit_scale"] == model.logit_scale.item() and about["inputs"]["text"] == "tokens"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ModelConfig(), "no equal of the image tower tiny"),
        (MLP_SMALL, "text tower takes no head, this one has mlp"),
        (replace(DINO_SMALL, image_head="mlp", head_width=48), "64 wide inside, this one 48"),
        (
            replace(DINO_SMALL, tower="test_vit"),
            "cannot build this model with the tower test_vit",
        ),  # made for 160 x 160
    ],
)
def test_what_open_clip_cannot_hold_is_said_in_one_line(config: ModelConfig, words: str, tmp_path: Path) -> None:
    run_of(tmp_path / "run", config)
    with pytest.raises(InputError, match=words) as error:
        export(ExportConfig(checkpoint=tmp_path / "run", to="open_clip", out=tmp_path / "out"))
    assert "--to safetensors or --to onnx" in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing half done is left


def test_an_export_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with GELU where quick GELU was trained."""
    run_of(tmp_path / "run", CLIP_SMALL)
    true = json.dumps
    monkeypatch.setattr("json.dumps", lambda *a, **k: true(*a, **k).replace('gelu": true', 'gelu": false'))
    with pytest.raises(InputError, match="embeddings differ by"):
        export(ExportConfig(checkpoint=tmp_path / "run", to="open_clip", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_stay_here(tmp_path: Path) -> None:
    path = tmp_path / "run" / "best.pt"
    run_of(path.parent, CLIP_SMALL)
    payload = read_checkpoint(path)
    payload["model"]["logit_scale"].fill_(torch.nan)
    write_checkpoint(path, payload)
    with pytest.raises(InputError, match="a weight is no number"):
        export(ExportConfig(checkpoint=path, to="safetensors", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_of(tmp_path / "run", CLIP_SMALL)
    arguments = ["--checkpoint", str(tmp_path / "run" / "best.pt"), "--to", "open_clip", "--out", str(tmp_path / "out")]
    main(arguments)
    assert "step 7" in capsys.readouterr().out
    for changed, words in (
        (arguments, "is there already"),
        (["--checkpoint", str(tmp_path), *arguments[2:]], "holds no"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(
                [*changed[:-1], str(tmp_path / "out")] if changed is arguments else [*changed[:-1], str(tmp_path / "b")]
            )
        assert words in capsys.readouterr().err
