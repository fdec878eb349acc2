"""A run's first weights: every format tensor by tensor, position embeddings resized, hostile and unfit files refused.

The references are open_clip's and timm's own small models with random weights; nothing here is downloaded.
"""

import hashlib
import os
import pickle
import struct
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import run_module
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

from shards.errors import InputError
from train.architecture import ModelConfig
from train.checkpoint import write_checkpoint
from train.config import TrainConfig
from train.evaluate import main as evaluate
from train.main import main
from train.model import ClipModel, build_model
from train.presets import PRESETS
from train.pretrained import read_tensors
from train.weights import fetch_all, files_of, find_weights, load_pretrained, parse_hub, show

CONTEXT, VOCAB, SIZE = 16, 100, 32
CLIP_SMALL = ModelConfig(
    tower="clip-vit",
    patch_size=16,
    image_width=64,
    image_layers=2,
    image_heads=2,
    embed_dim=32,
    text_width=32,
    text_layers=2,
    text_heads=2,
    quick_gelu=True,
)
DINO_SMALL = replace(CLIP_SMALL, tower="test_vit", image_head="linear")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    """open_clip's own CLIP of the small sizes, every weight random, those included that start as ones and zeros."""
    torch.manual_seed(1)
    model = CLIP(
        32,
        CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=16, image_size=SIZE),
        CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCAB, width=32, heads=2, layers=2),
        quick_gelu=True,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def fresh(config: ModelConfig, *, image_size: int = SIZE, context: int = CONTEXT, vocab: int = VOCAB) -> ClipModel:
    torch.manual_seed(2)
    return build_model(config, vocab_size=vocab, context=context, image_size=image_size).eval()


def settings(vision: Path | str = "none", text: Path | str = "none", preset: str = "tiny") -> TrainConfig:
    return TrainConfig(shards=Path(), out=Path(), preset=preset, vision_weights=str(vision), text_weights=str(text))


def refusal(call: Callable, *arguments: object) -> str:
    """The line in which a command or function refuses."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def as_torchscript(path: Path, model: CLIP) -> None:
    """As OpenAI ships it: traced, in half precision, with its sizes among its buffers."""
    model = deepcopy(model).half()
    for name in ("context_length", "vocab_size"):
        delattr(model, name)
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.register_buffer(name, torch.tensor(7))
    inputs = {
        "encode_image": (torch.randn(1, 3, SIZE, SIZE).half(),),
        "encode_text": (torch.ones(1, CONTEXT, dtype=torch.int64),),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated; the archives are there
        torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), str(path))


def as_ours(path: Path, model: CLIP) -> None:
    """A checkpoint of a run, with an average of the weights, which is what counts then."""
    found = model.state_dict()
    ours = {f"image.{n.removeprefix('visual.')}": t for n, t in found.items() if n.startswith("visual.")}
    ours |= {f"text.{n}": t for n, t in found.items() if not n.startswith(("visual.", "logit_scale"))}
    nothing = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    write_checkpoint(path, {"model": nothing, "ema": ours | {"logit_scale": torch.tensor(0.0)}})


def as_trainer(path: Path, model: CLIP) -> None:
    """open_clip's trainer, under DDP."""
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {"state": {0: torch.ones(2)}}}, path)


def as_custom_text(path: Path, model: CLIP) -> None:
    """open_clip's newer naming, as of its models with timm's towers."""
    found = model.state_dict()
    save_file({n if n.startswith(("visual.", "logit")) else f"text.{n}": t for n, t in found.items()}, path)


FORMATS: dict[str, Callable[[Path, CLIP], None]] = {
    "safetensors": lambda path, model: save_file(model.state_dict(), path),
    "custom-text": as_custom_text,
    "torch": lambda path, model: torch.save(model.state_dict(), path),
    "torch-1.5": lambda path, model: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "open-clip-trainer": as_trainer,
    "openai": as_torchscript,
    "ours": as_ours,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_tensor_by_tensor(name: str, clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    FORMATS[name](path, clip)
    model = fresh(CLIP_SMALL)
    told = load_pretrained(model, settings(path, path))
    wanted = clip.state_dict()
    if name == "openai":
        wanted = {name: tensor.half().float() for name, tensor in wanted.items()}
    image, text = model.image.state_dict(), model.text.state_dict()
    assert [line.split(" from ")[0] for line in told] == ["image tower: 32 tensors", "text tower: 29 tensors"]
    assert len(image) + len(text) + 1 == len(wanted) == len(clip.state_dict())
    for key, tensor in image.items():
        assert torch.equal(tensor, wanted[f"visual.{key}"]), key
    for key, tensor in text.items():
        assert torch.equal(tensor, wanted[key]), key
    assert model.logit_scale.item() == pytest.approx(-torch.tensor(0.07).log().item())  # a setting, not a weight


def test_with_the_same_weights_it_is_the_same_model(clip: CLIP, tmp_path: Path) -> None:
    """Quick GELU included: with GELU the embeddings differ."""
    save_file(clip.state_dict(), tmp_path / "w")
    images, tokens = torch.randn(3, 3, SIZE, SIZE), torch.randint(1, VOCAB - 1, (3, CONTEXT))
    tokens[:, 5], tokens[:, 6:] = VOCAB - 1, 0
    for quick, same in ((True, True), (False, False)):
        model = fresh(replace(CLIP_SMALL, quick_gelu=quick))
        load_pretrained(model, settings(tmp_path / "w", tmp_path / "w"))
        with torch.inference_mode():
            assert torch.allclose(model.encode_image(images), clip.encode_image(images), atol=1e-5) is same
            assert torch.allclose(model.encode_text(tokens[:, :8]), clip.encode_text(tokens), atol=1e-5) is same


def timm_weights(name: str, size: int) -> Tensors:
    """timm's own model, random throughout."""
    torch.manual_seed(3)
    model = timm.create_model(name, img_size=size)
    return {key: torch.randn_like(tensor) * 0.1 for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("writer", [save_file, torch.save])
def test_timms_own_file_fills_the_trunk_and_leaves_the_new_head(writer: Callable, tmp_path: Path) -> None:
    weights = timm_weights("test_vit", SIZE)
    writer(weights, tmp_path / "w")
    model = fresh(DINO_SMALL)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_pretrained(model, settings(tmp_path / "w"))
    assert {key for key in weights if key.startswith("head.")} == {"head.weight", "head.bias"}  # its classifier
    for key, tensor in model.state_dict().items():
        trunk = key.removeprefix("image.trunk.")
        assert torch.equal(tensor, weights[trunk] if trunk != key else before[key]), key


def test_dinov3_has_no_position_embeddings_to_resize(tmp_path: Path) -> None:
    """At any size all tensors are taken as they are; Meta's own names are understood too."""
    config = replace(DINO_SMALL, tower="vit_tiny_patch16_dinov3_qkvb")
    weights = timm_weights(config.tower, 64)
    assert "pos_embed" not in weights
    save_file(weights, tmp_path / "w")
    model = fresh(config)
    load_pretrained(model, settings(tmp_path / "w"))
    for key, tensor in weights.items():
        assert torch.equal(model.image.trunk.state_dict()[key], tensor), key


def resized(grid: torch.Tensor, size: int) -> torch.Tensor:
    """(rows * rows, D) position embeddings on another grid: bicubic with antialias."""
    rows = int(len(grid) ** 0.5)
    square = grid.T.reshape(1, -1, rows, rows)
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0].flatten(1).T


def test_position_embeddings_of_timms_towers_are_resized(tmp_path: Path) -> None:
    """As DINOv2's from 518 pixels to 224: a class token without a position of its own grid, then the grid."""
    weights = timm_weights("test_vit", 96)
    save_file(weights, tmp_path / "w")
    model = fresh(DINO_SMALL)
    load_pretrained(model, settings(tmp_path / "w"))
    found, old = model.image.trunk.state_dict(), weights["pos_embed"][0]
    assert (len(old), found["pos_embed"].shape) == (1 + 6 * 6, (1, 1 + 2 * 2, 64))
    assert torch.equal(found["pos_embed"][0, :1], old[:1])
    assert torch.allclose(found["pos_embed"][0, 1:], resized(old[1:], 2), atol=1e-6)
    assert all(torch.equal(found[key], weights[key]) for key in found if key != "pos_embed")


def test_position_embeddings_of_clip_are_resized(clip: CLIP, tmp_path: Path) -> None:
    save_file(clip.state_dict(), tmp_path / "w")
    model = fresh(CLIP_SMALL, image_size=64)
    load_pretrained(model, settings(tmp_path / "w"))
    old, new = clip.visual.positional_embedding, model.image.positional_embedding
    assert (old.shape, new.shape) == ((1 + 2 * 2, 64), (1 + 4 * 4, 64))
    assert torch.equal(new[:1], old[:1])
    assert torch.allclose(new[1:], resized(old[1:], 4), atol=1e-6)


def test_a_shorter_context_keeps_what_positions_mean(clip: CLIP, tmp_path: Path) -> None:
    save_file(clip.state_dict(), tmp_path / "w")
    model = fresh(CLIP_SMALL, context=10)
    load_pretrained(model, settings(text=tmp_path / "w"))
    assert torch.equal(model.text.positional_embedding, clip.positional_embedding[:10])
    with pytest.raises(InputError, match=r"1 of another shape \(positional_embedding is \(16, 32\), not \(20, 32\)\)"):
        load_pretrained(fresh(CLIP_SMALL, context=20), settings(text=tmp_path / "w"))


def test_heads_on_the_text_tower_are_new(clip: CLIP, tmp_path: Path) -> None:
    """As in cxr-dinov3-mlp768: CLIP's tower whole, its projection included, under an MLP."""
    save_file(clip.state_dict(), tmp_path / "w")
    model = fresh(replace(DINO_SMALL, image_head="mlp", text_head="mlp", head_width=48, embed_dim=24))
    before = {key: tensor.clone() for key, tensor in model.text.head.state_dict().items()}
    load_pretrained(model, settings(text=tmp_path / "w"))
    assert all(torch.equal(t, clip.state_dict()[key]) for key, t in model.text.trunk.state_dict().items())
    assert all(torch.equal(t, before[key]) for key, t in model.text.head.state_dict().items())
    assert {tuple(t.shape) for key, t in before.items() if "weight" in key} == {(48, 32), (24, 48)}


def without(found: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in found.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: without(w, "ln_final.bias", "text_projection"),
            "2 tensors missing (text_projection, ln_final.bias)",
        ),
        (lambda w: w | {f"more.{n}": torch.ones(1) for n in range(5)}, "5 unknown (more.0, more.1, more.2, ...)"),
        (lambda w: w | {"text_projection": torch.ones(2, 2)}, "1 of another shape (text_projection is (2, 2), not (32"),
        (lambda w: w | {"ln_final.bias": torch.full((32,), torch.nan)}, "1 not finite numbers (ln_final.bias)"),
        (lambda w: w | {"ln_final.bias": torch.ones(32, dtype=torch.int64)}, "1 not finite numbers (ln_final.bias)"),
    ],
)
def test_unfit_weights_are_refused_and_change_nothing(change: Callable, words: str, clip: CLIP, tmp_path: Path) -> None:
    save_file(change(clip.state_dict()), tmp_path / "w")
    model = fresh(CLIP_SMALL)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_pretrained(model, settings(text=tmp_path / "w"))
    assert words in str(error.value) and "--text-weights" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
def test_what_trainers_wrap_around_weights_comes_off(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    """DDP's and torch.compile's prefixes; the other things of a checkpoint stay behind."""
    weights = {f"{prefix}a.weight": torch.ones(2), f"{prefix}b": torch.zeros(1)}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "w")
    assert {name: len(tensor) for name, tensor in read_tensors(tmp_path / "w").items()} == {"a.weight": 2, "b": 1}


def test_half_a_head_is_no_new_head(tmp_path: Path) -> None:
    """A run's own file brings its head; a part of one is damage, not the wish for a fresh one."""
    config = replace(DINO_SMALL, image_head="mlp", head_width=48, embed_dim=24)
    weights = without(fresh(config).state_dict(), "image.head.mlp.fc2.weight")
    save_file({name: tensor for name, tensor in weights.items() if name.startswith("image.")}, tmp_path / "w")
    with pytest.raises(InputError, match=r"1 tensors missing \(head\.mlp\.fc2\.weight\)"):
        load_pretrained(fresh(config), settings(tmp_path / "w"))


def test_a_file_of_another_tower_is_refused(clip: CLIP, tmp_path: Path) -> None:
    save_file(clip.state_dict(), tmp_path / "clip")
    save_file(timm_weights("test_vit", SIZE), tmp_path / "timm")
    for config, name in ((DINO_SMALL, "clip"), (CLIP_SMALL, "timm"), (ModelConfig(), "clip")):
        with pytest.raises(InputError, match="does not fit"):
            load_pretrained(fresh(config), settings(tmp_path / name))


class Payload:
    """Pickled, it calls os.mkdir when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def archive(path: Path, pickled: bytes, storage: bytes = b"", *, script: bool, packed: bool = False) -> None:
    """A zip such as torch's, or TorchScript's."""
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in (("data.pkl", pickled), ("data/0", storage), ("byteorder", b"little"), ("version", b"3")):
            file.writestr(f"w/{name}", content)
        if script:
            file.writestr("w/constants.pkl", pickle.dumps(()))


MODULE = b"\x80\x02c__torch__\nM\n)\x81"
"""Opcodes that make a module of TorchScript's."""


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], elements: int) -> bytes:
    """A module whose `w` is a tensor of a size over a storage of `elements` float32."""
    return MODULE + b"}X\x01\0\0\0w" + rebuilt(b"Float", size, stride, elements) + b"sb."


def rebuilt(kind: bytes, size: tuple[int, ...], stride: tuple[int, ...], elements: int) -> bytes:
    """Opcodes that make a tensor over data/0."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\n%sStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" % kind
    storage += numbers((elements,))[1:-1]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQK\0" + numbers(size) + numbers(stride) + b"\x89NtR"


def test_torchscript_by_hand(tmp_path: Path) -> None:
    """The hand-made opcodes below are refused for what they say, not for how they are written."""
    archive(tmp_path / "w", tensor_pickle((2, 1), (1, 1), 2), struct.pack("<2f", 1.5, -2), script=True)
    assert read_tensors(tmp_path / "w")["w"].tolist() == [[1.5], [-2.0]]


def packed(path: Path) -> None:
    """A good torch archive whose entries are compressed: few bytes that would unpack to many."""
    torch.save({"w": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def with_itself(times: int) -> bytes:
    """Modules of which each holds the one before twice: 2^times ways to the first."""
    one = b"}(X\x01\0\0\0ah\0X\x01\0\0\0bh\0ub"
    return MODULE + b"".join(b"q\0" + MODULE[2:] + one for _ in range(times)) + b"."


def script(pickled: bytes, storage: bytes = b"", *, compressed: bool = False) -> Callable[[Path], None]:
    return lambda path: archive(path, pickled, storage, script=True, packed=compressed)


def cut(path: Path) -> None:
    torch.save({"w": torch.ones(9)}, path)
    os.truncate(path, 300)


def header(size: int, text: bytes, data: int = 0) -> Callable[[Path], None]:
    """A safetensors file that says its header has `size` bytes."""
    return lambda path: path.write_bytes(struct.pack("<Q", size) + text + bytes(data))


TWICE = b"".join(
    b"X\x01\0\0\0" + kind[:1] + rebuilt(kind, (1,), (1,), elements)
    for kind, elements in ((b"Float", 16000), (b"Int", 16000))
)
LONG = b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}} '
CALL = b"\x80\x02cos\nmkdir\nX\x04\0\0\0evil\x85R."
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torch archive that calls": (lambda path: torch.save({"w": Payload(path.with_name("evil"))}, path), "more than"),
    "old pickle that calls": (
        lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("evil")))),
        "more than",
    ),
    "torchscript that calls": (script(CALL), "it names 'os.mkdir'"),
    "torchscript that names eval": (script(b"\x80\x02cbuiltins\neval\n."), "it names 'builtins.eval'"),
    "torchscript of another protocol": (script(pickle.dumps([1], 4)), "more than tensors"),
    "torchscript with a state for a function": (script(b"\x80\x02ccollections\nOrderedDict\n}b."), "gives a state"),
    "torchscript that calls a module": (script(b"\x80\x02c__torch__\nM\n)R."), "calls what is no function"),
    "torchscript that makes a tensor type": (script(b"\x80\x02ctorch\nFloatStorage\n)\x81."), "no module"),
    "torchscript without a module": (script(b"\x80\x02}."), "no module at its top"),
    "torchscript that asks for a petabyte": (script(b"\x80\x02\x96" + b"\xff" * 6 + b"\0\0."), "more than tensors"),
    "tensor larger than its storage": (script(tensor_pickle((10**6, 10**6), (0, 0), 2), bytes(8)), "smaller storage"),
    "tensor past its storage": (script(tensor_pickle((2,), (9,), 2), bytes(8)), "out of bounds"),
    "storage that lies": (script(tensor_pickle((2,), (1,), 3), bytes(8)), "a storage of 3 elements has 2"),
    "storage read as two types": (script(MODULE + b"}(" + TWICE + b"ub.", bytes(64000)), "or larger than"),
    "torchscript of endless opcodes": (script(b"\x80\x02" + b"0" * (17 << 20)), "or larger than 16,777,216 bytes"),
    "module in itself": (script(MODULE + b"q\0}X\x01\0\0\0mh\0sb."), "more than 20,000 modules"),
    "modules 2^40 times": (script(with_itself(40)), "more than 20,000 modules"),
    "packed torchscript": (script(tensor_pickle((2, 1), (1, 1), 2), bytes(8), compressed=True), "is compressed"),
    "packed torch archive": (packed, "unpacks to more than its size"),
    "safetensors of a huge header": (header(2**40, b"{}"), "a header of 1,099,511,627,776 bytes"),
    "safetensors of a large header": (header(17 * 2**20, b"{" + b" " * (17 * 2**20 - 2) + b"}"), "a header of 17,"),
    "safetensors past its end": (header(56, LONG, data=4), "damaged"),
    "cut torch archive": (cut, "damaged"),
    "sparse tensor": (lambda path: torch.save({"w": torch.ones(2, 2).to_sparse()}, path), "no plain array"),
    "expanded tensor": (lambda path: torch.save({"w": torch.ones(1).expand(10**9)}, path), "no plain array"),
    "no dict": (lambda path: torch.save([torch.ones(1)], path), "holds a list"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no tensors"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "neither safetensors nor"),
    "nothing": (lambda path: path.write_bytes(b""), "neither safetensors nor"),
    "a folder": (Path.mkdir, "is no file"),
    "a pipe": (os.mkfifo, "is no file"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on an old pickle and on sparse tensors
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = HOSTILE[name]
    make(tmp_path / "w")
    line = refusal(read_tensors, tmp_path / "w")
    assert str(tmp_path / "w") in line and words in line and "weights_only" not in line, "torch advises to run it"
    assert not (tmp_path / "evil").exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    """The test above can fail: read by pickle itself, the payload makes the folder."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "evil")))
    assert (tmp_path / "evil").is_dir()


def test_the_folder_of_a_run_is_its_best_checkpoint(clip: CLIP, tmp_path: Path) -> None:
    """`--vision-weights RUN --text-weights RUN`."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert "holds no weight file" in refusal(load_pretrained, fresh(CLIP_SMALL), settings(run, run))
    as_ours(run / "best.pt", clip)
    model = fresh(CLIP_SMALL)
    load_pretrained(model, settings(run, run))
    for name, tensor in model.image.state_dict().items():
        assert torch.equal(tensor, clip.visual.state_dict()[name]), name
    assert torch.equal(model.text.token_embedding.weight, clip.token_embedding.weight)


def test_names_of_the_hub() -> None:
    assert str(parse_hub("hub:a/b/c.safetensors")) == "hub:a/b/c.safetensors"
    assert parse_hub("/a/b/c") is None
    for wrong in ("hub:a/b", "hub:a//c", "hub:a/b/c/d", "hub:../b/c"):
        with pytest.raises(InputError, match="hub:ORG/REPO/FILE"):
            parse_hub(wrong)
    with pytest.raises(InputError, match="--text-weights gone is not there; name"):
        find_weights("gone", option="--text-weights", preset="tiny")
    assert [str(file) for file in files_of("cxr-dinov3-clip")] == [
        "hub:timm/vit_base_patch16_dinov3.lvd1689m/model.safetensors",
        "hub:timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors",
    ]
    assert len(files_of("chexzero")) == 1 and files_of("tiny") == []


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub: one file of one repository, another that is closed."""

    content = b""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        gated, known = "closed" in self.path, self.path.endswith("/open/one/resolve/main/model.safetensors")
        self.send_response(403 if gated else 200 if known else 404)
        if gated or not known:
            self.send_header("X-Error-Code", "GatedRepo" if gated else "EntryNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Address of a hub on this machine."""
    save_file({"w": torch.ones(3)}, tmp_path / "served")
    Hub.content = (tmp_path / "served").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache for this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home" / "hub"


def test_fetch_into_the_cache_and_show(hub: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The client itself, against a hub on this machine; what it fetched is then found without one."""
    show("hub:open/one/model.safetensors")
    assert "model.safetensors: missing" in capsys.readouterr().out
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    done = run_module("train.weights", "fetch", "hub:open/one/model.safetensors", **environment)
    assert done.returncode == 0 and "1 tensors" in done.stdout, (done.stdout, done.stderr)
    (found,) = cache.rglob("snapshots/*/model.safetensors")
    assert found.read_bytes() == Hub.content
    show("hub:open/one/model.safetensors")
    assert f"model.safetensors: {found}, {len(Hub.content)} bytes" in capsys.readouterr().out
    assert find_weights("hub:open/one/model.safetensors", option="--vision-weights", preset="tiny") == found


def test_what_the_hub_does_not_give(hub: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}"
    )
    assert "accepted its licence" in refusal(fetch_all, "hub:closed/two/model.safetensors")
    assert "hub:open/three/w could not be fetched" in refusal(fetch_all, "hub:open/three/w")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be reached" in refusal(fetch_all, "cxr-dinov3-clip")
    assert "unknown preset 'nothing'" in refusal(fetch_all, "nothing")
    assert not list(cache.rglob("*.safetensors"))


def test_a_missing_file_is_named_with_the_command_that_fetches_it(
    shards_dir: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ["--preset", "chexzero", "--shards", str(shards_dir), "--out", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        main(run)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    file = "timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors"
    for words in (file, "--vision-weights", str(cache), "`python -m train.weights fetch chexzero`"):
        assert words in line
    with pytest.raises(SystemExit, match="2"):
        main([*run, "--preset=tiny", "--vision-weights", "hub:a/b/c"])
    assert "`python -m train.weights fetch hub:a/b/c`" in capsys.readouterr().err, "tiny has no files to fetch"
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_weights_are_for_the_beginning_only(shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run starts from a file, goes on and is evaluated without it, and no checkpoint says where it lay."""
    model = fresh(CLIP_SMALL, context=77, vocab=49408)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = tmp_path / "secret-place"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    sizes = {
        **{name: getattr(CLIP_SMALL, name) for name in ("patch_size", "image_width", "image_layers", "image_heads")}
    }
    sizes |= {name: getattr(CLIP_SMALL, name) for name in ("embed_dim", "text_width", "text_layers", "text_heads")}
    flags = [word for name, value in sizes.items() for word in (f"--model.{name.replace('_', '-')}", str(value))]
    run = [
        *("--preset", "chexzero", *flags, "--shards", str(shards_dir), "--out", str(tmp_path / "run")),
        *("--batch-size", "8", "--steps", "3", "--data.image-size", str(SIZE), "--device", "cpu", "--threads", "1"),
        *("--vision-weights", str(weights), "--text-weights", str(weights), "--resume", "auto"),
    ]
    main([*run, "--stop-at", "1"])
    told = capsys.readouterr().err
    assert "image tower: 32 tensors" in told and "text tower: 29 tensors" in told
    saved = read_tensors(next((tmp_path / "run" / "checkpoints").glob("*.pt")))
    change = (saved["text.token_embedding.weight"] - model.text.token_embedding.weight).abs().max().item()
    assert 0 <= change < 0.01  # one small step from where the file stood, and not from chance
    weights.unlink()
    main(run)
    told = capsys.readouterr().err
    assert "going on after step 1" in told and "tower" not in told
    evaluate(["--checkpoint", str(tmp_path / "run"), "--shards", str(shards_dir), "--resamples", "0"])
    assert "tower" not in capsys.readouterr().err
    for path in (tmp_path / "run").rglob("*.pt"):
        assert b"secret-place" not in path.read_bytes()


def test_presets_of_real_size_on_the_meta_device() -> None:
    """Every preset's model can be built; the parameters, in millions, are those of the published towers."""
    wanted = {"cxr-dinov3-clip": (86.0, 63.4), "cxr-dinov3-mlp768": (88.1, 65.4), "chexzero": (87.8, 63.4)}
    for name, (image, text) in wanted.items():
        config = PRESETS[name]()
        with torch.device("meta"):
            model = build_model(config.model, vocab_size=49408, context=77, image_size=config.data.image_size)
        sizes = [sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (model.image, model.text)]
        assert sizes == pytest.approx([image, text], abs=0.06), name
