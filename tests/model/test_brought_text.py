"""Text models as people have them: whole ones of every layout load, others are one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import captions, tiny_text, word_tokenizer
from text_support import bert, clip, llama, qwen2, save, t5

from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText, TextConfig
from flowray.model.prompts import check_captions, load_tokenizer
from flowray.model.text import load_text, planned_text

PROMPTS = ["a small red circle", "a large blue square on the left", "circle"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("brought") / "qwen")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def tokens(path: Path, **options: Any) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = load_text(CausalText(path=str(path), queries=3, **options))
    with torch.no_grad():
        return text(text.tokenize(PROMPTS)).values


def one_line(config: TextConfig | Path, *words: str) -> None:
    """Loading ends in an InputError that begins with a key of the text model and has the words."""
    with pytest.raises(InputError, match=r"^model\.text\.") as caught:
        load_text(CausalText(path=str(config)) if isinstance(config, Path) else config)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_folders_as_downloads_and_clones_leave_them(folder: Path, original: Path) -> None:
    for hidden in (".cache/huggingface/download", ".git/lfs/objects", "onnx", "assets"):
        (folder / hidden).mkdir(parents=True)
        (folder / hidden / "model.safetensors.lock").write_text("")
    assert torch.equal(tokens(folder), tokens(original))


def test_the_hubs_own_cache_folder(original: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    shutil.copytree(original, cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    assert torch.equal(tokens(cache), tokens(original))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder: a CLIP text encoder, its tokenizer beside it, and other parts."""
    root = tmp_path_factory.mktemp("pipeline")
    save(clip, root / "text_encoder")
    (root / "tokenizer").mkdir()
    for file in (root / "text_encoder").glob("tokenizer*"):
        file.rename(root / "tokenizer" / file.name)
    (root / "model_index.json").write_text("{}")
    for part in ("vae", "unet"):
        (root / part).mkdir()
        (root / part / "config.json").write_text('{"_class_name": "Other"}')
    return root


def test_the_text_encoder_of_a_pipeline(pipeline: Path) -> None:
    given = [
        load_text(EncoderText(path=str(path), max_tokens=16))
        for path in (pipeline, pipeline / "text_encoder")
    ]
    ids = [text.tokenize(PROMPTS).ids for text in given]
    assert torch.equal(ids[0], ids[1])
    assert ids[0].unique().numel() > 6
    one_line(
        EncoderText(path=str(pipeline / "vae")),
        "holds Other",
        f"type model.text.path={pipeline}/text_encoder",
    )


def test_two_text_encoders_are_named(pipeline: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(pipeline, tmp_path / "sdxl"))
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(root / name, root / f"{name}_2")
    one_line(
        EncoderText(path=str(root)), f"type model.text.path={root}/text_encoder", "text_encoder_2"
    )
    assert load_text(EncoderText(path=str(root / "text_encoder_2"), max_tokens=16)).width == 32


def test_a_folder_of_models_and_an_empty_one(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "models" / "qwen")
    one_line(tmp_path / "models", f"type model.text.path={tmp_path}/models/qwen")
    (tmp_path / "empty").mkdir()
    one_line(tmp_path / "empty", "no config.json")
    one_line(original / WEIGHTS.replace("model", "other"), "no such file")
    # the weights' file for their folder
    assert torch.equal(tokens(original / WEIGHTS), tokens(original))


def lfs_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)


def lfs_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)


def cut_off(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1000)


def emptied(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 0)


def config_cut_off(folder: Path) -> None:
    os.truncate(folder / "config.json", 40)


def config_of_nulls(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=None)


def half_a_vocabulary(folder: Path) -> None:
    """GPT-2's two files, and one of them lost: every word would fall into letters."""
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (folder / "vocab.json").write_text(
        json.dumps({letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ")})
    )


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "tf_model.h5")


def shard_missing(folder: Path) -> None:
    reshard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def reshard(folder: Path) -> None:
    from transformers import Qwen3Model

    net = Qwen3Model.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    net.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def stored_as_fp8(folder: Path) -> None:
    weights = {
        key: value.to(torch.float8_e4m3fn) for key, value in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def own_code(folder: Path) -> None:
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    (folder / "modeling_own.py").write_text(code)
    (folder / "configuration_own.py").write_text(code)
    parts = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    edit(folder / "config.json", model_type="own_chat", auto_map=parts)


def own_tokenizer(folder: Path) -> None:
    (folder / "tokenization_own.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    )
    (folder / "tokenizer.json").rename(folder / "own.tiktoken")
    parts = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=parts)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (lfs_weights, "lfs pull"),
    (lfs_tokenizer, "lfs pull"),
    (cut_off, "cut off"),
    (emptied, "cut off"),
    (config_cut_off, "is no JSON"),
    (config_of_nulls, "hidden_size"),
    (half_a_vocabulary, "merges"),
    (no_weights, "tf_model.h5"),
    (shard_missing, "lacks 1 of"),
    (stored_as_fp8, "F8_E4M3"),
    (own_code, "auto_map"),
    (own_tokenizer, "auto_map"),
]


@pytest.mark.parametrize(
    ("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES]
)
def test_what_cannot_be_read_is_one_line(
    damage: Callable[[Path], None], words: str, folder: Path
) -> None:
    damage(folder)
    one_line(folder, words, str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_checkpoints_are_refused(method: str, folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    one_line(folder, method)
    edit(
        folder / "config.json",
        quantization_config=None,
        text_config={"quantization_config": {"quant_method": method}},
    )
    one_line(folder, method)


def test_own_code_beside_a_class_of_transformers_is_not_run(folder: Path) -> None:
    before = tokens(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    edit(
        folder / "config.json",
        auto_map={"AutoModel": "modeling_own.OwnModel", "AutoConfig": "modeling_own.OwnConfig"},
    )
    assert torch.equal(tokens(folder), before)


def test_shards_a_pickle_and_a_variant_load(folder: Path) -> None:
    before = tokens(folder)
    reshard(folder)
    assert torch.equal(tokens(folder), before)
    weights = {
        key: value
        for file in folder.glob("model-*.safetensors")
        for key, value in load_file(file).items()
    }
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(tokens(folder), before)
    (folder / "pytorch_model.bin").unlink()
    halves = {key: value.half() for key, value in weights.items()}
    save_file(halves, folder / "model.fp16.safetensors", metadata={"format": "pt"})
    assert torch.allclose(tokens(folder), before, atol=1e-2)
    save_file(halves, folder / "model.non_ema.safetensors", metadata={"format": "pt"})
    one_line(
        folder, f"type model.text.path={folder}/model.fp16.safetensors or model.non_ema.safetensors"
    )
    assert torch.allclose(tokens(folder / "model.fp16.safetensors"), before, atol=1e-2)


class Touches:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_code_in_a_pickle_is_never_run(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"embed_tokens.weight": Touches(folder / "ran")}, folder / "pytorch_model.bin")
    one_line(folder, "safetensors")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("make", [qwen2, llama, clip, bert])
@pytest.mark.parametrize("kept", ["tokenizer_config.json", "nothing"])
def test_weights_without_a_vocabulary_are_refused(make: Any, kept: str, tmp_path: Path) -> None:
    """transformers would make a tokenizer up, to which all captions are the same."""
    save(make, tmp_path)
    for file in tmp_path.iterdir():
        if file.name not in ("config.json", WEIGHTS, kept):
            file.unlink()
    kind = EncoderText if make in (clip, bert) else CausalText
    one_line(kind(path=str(tmp_path), max_tokens=16), "tokenizer")


def sentencepiece_model(path: Path) -> None:
    """A unigram model with the words of PROMPTS."""
    from transformers.utils import sentencepiece_model_pb2_new as format

    model = format.ModelProto()
    pieces = [
        ("<pad>", 3),
        ("</s>", 3),
        ("<unk>", 2),
        *((f"▁{word}", 1) for word in sorted(set(" ".join(PROMPTS).split()))),
    ]
    for i, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(i), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.unk_id, model.trainer_spec.eos_id = 1, 2, 1
    path.write_bytes(model.SerializeToString())


def test_a_tokenizer_of_sentencepiece_alone(tmp_path: Path) -> None:
    from transformers.utils.import_utils import is_sentencepiece_available

    save(t5, tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    sentencepiece_model(tmp_path / "spiece.model")
    if is_sentencepiece_available():
        pytest.skip("the package sentencepiece is here and reads it")
    one_line(EncoderText(path=str(tmp_path)), "pip install sentencepiece", "spiece.model")


def mamba(path: Path) -> None:
    from transformers import MambaConfig, MambaModel

    MambaModel(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).save_pretrained(path)


def rwkv(path: Path) -> None:
    from transformers import RwkvConfig, RwkvModel

    RwkvModel(
        RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    ).save_pretrained(path)


def lfm2(path: Path) -> None:
    from transformers import Lfm2Config, Lfm2Model

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    Lfm2Model(
        Lfm2Config(**sizes, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    ).save_pretrained(path)


def bloom(path: Path) -> None:
    from transformers import BloomConfig, BloomModel

    BloomModel(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        path
    )


@pytest.mark.parametrize("make", [mamba, rwkv, lfm2, bloom])
def test_models_without_a_cache_of_attention_are_refused(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    one_line(tmp_path, make.__name__, "running state")


@pytest.mark.parametrize("pad", [None, "beyond"])
@pytest.mark.parametrize("eos", [True, False])
def test_padding_needs_no_token_of_its_own(pad: str | None, eos: bool, folder: Path) -> None:
    """No pad token, or one added beyond the embedding: padding is masked, so any id will do."""
    before = tokens(folder)
    tokenizer = word_tokenizer()
    count = len(tokenizer)
    tokenizer.pad_token = None
    if not eos:
        tokenizer.eos_token = None
    if pad:
        tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
        assert tokenizer.pad_token_id == count
    tokenizer.save_pretrained(folder)
    text = load_text(CausalText(path=str(folder), queries=3))
    ids, mask = text.tokenize(PROMPTS)
    assert not bool(mask.all())
    assert int(ids.max()) < count
    assert torch.allclose(tokens(folder), before, atol=1e-6)


def test_ids_beyond_the_embedding_are_one_line(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    text = load_text(CausalText(path=str(folder), queries=3))
    text.tokenize(PROMPTS)
    with pytest.raises(InputError, match=r"^model\.text\.path: .*zebra.* embeddings"):
        text.tokenize([*PROMPTS, "a zebra"])


def test_positions_that_begin_behind_the_padding(tmp_path: Path) -> None:
    """RoBERTa's: of 20 positions, padding being the token 0, a caption has 19."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
    }
    config = RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=20, pad_token_id=0)
    RobertaModel(config).save_pretrained(tmp_path)
    one_line(EncoderText(path=str(tmp_path), max_tokens=20), "19 positions")
    text = load_text(EncoderText(path=str(tmp_path), max_tokens=19))
    with pytest.warns(UserWarning, match="was cut to 19"):
        prompts = text.tokenize([" ".join(["red"] * 30)])
    assert text(prompts).values.shape == (1, 19, 16)


def test_widths_come_from_config_json_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with torch.device("meta"):
        plan = planned_text(CausalText(path=str(folder), queries=6))
    assert plan.width == 32
    assert sum(p.numel() for p in plan.backbone.parameters()) > 10_000
    with pytest.raises(InputError, match=r"^model\.text\.width: .*64.*32"), torch.device("meta"):
        planned_text(CausalText(path=str(folder), width=64))
    for path, words in (
        ("org/absent", r"^model\.text\.width: .*hf download org/absent config\.json"),
        (f"{folder}x", "did you mean"),
    ):
        with pytest.raises(InputError, match=words):
            planned_text(CausalText(path=path))


def checked(config: TextConfig, texts: list[str]) -> str | None:
    return check_captions(load_tokenizer(config), texts)


def test_different_captions_give_different_tokens(original: Path) -> None:
    config = CausalText(path=str(original))
    assert checked(config, captions(64)) is None
    assert checked(CausalText(), captions(64)) is None  # the shipped one
    assert checked(config, ["a red circle"]) is None
    # the captions are the same, no fault of the model's
    assert checked(config, ["A red  circle", "a red circle "]) is not None
    assert "all the same" in str(checked(config, ["a red circle"] * 3))


@pytest.mark.parametrize(
    ("changes", "texts", "key"),
    [
        (
            {"max_tokens": 2},
            [f"a large {colour} square" for colour in ("red", "blue", "green")],
            r"model\.text\.max_tokens",
        ),
        (
            {"template": "a small red circle on the left {prompt}", "max_tokens": 8},
            captions(40),
            r"model\.text\.max_tokens",
        ),
        ({}, ["红色的圆形", "蓝色的正方形", "绿色"], r"model\.text\.path: .*0%"),
    ],
)
def test_captions_that_all_become_the_same_are_refused(
    changes: dict[str, Any], texts: list[str], key: str, original: Path
) -> None:
    with pytest.raises(InputError, match=f"^{key}"):
        checked(CausalText(path=str(original), **changes), texts)


def test_a_few_captions_that_become_the_same_are_a_warning(original: Path) -> None:
    texts = [*captions(30), "a small red circle zebra", "a small red circle giraffe"]
    warning = str(checked(CausalText(path=str(original)), texts))
    assert "zebra" in warning
    assert warning.startswith("warning: model.text.path")
