"""Tiny random text models and tokenizers, saved as transformers saves them: what the tests of
the text side load by path.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import captions, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

VOCABULARY = 320
WINDOW = 4  # of mistral_sliding, shorter than the prompts
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHAT) -> Any:
    """A byte-level BPE tokenizer as Qwen's: chat markers, a chat template, nothing added to a
    plain text.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions(300), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=marks[0],
        eos_token=marks[1],
        additional_special_tokens=marks[2:],
        chat_template=template,
    )


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    net = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    return net, net.model


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    net = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    return net, net.model


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    net = LlamaForCausalLM(LlamaConfig(**SIZES))
    return net, net.model


def mistral_sliding() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    net = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW))
    return net, net.model


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tower |= {"image_size": (28, 28), "patch_size": (14, 14)}
    net = InternVLForConditionalGeneration(
        InternVLConfig(text_config=Qwen2Config(**SIZES), vision_config=tower)
    )
    return net, net.model.language_model


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    return _qwen_vl(Qwen2VLConfig, Qwen2VLForConditionalGeneration, tower)


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 32,
    }
    return _qwen_vl(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, tower)


def _qwen_vl(config: Any, model: Any, tower: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    net = model(config(text_config={**SIZES, "rope_parameters": rope}, vision_config=tower))
    return net, net.model.language_model


Maker = Callable[[], tuple[nn.Module, nn.Module]]
CAUSAL: list[Maker] = [qwen2, qwen3, llama, internvl, qwen2_vl, qwen2_5_vl]


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tower = {**sizes, "image_size": 8, "patch_size": 4, "hidden_size": 16}
    words = {
        **sizes,
        "vocab_size": VOCABULARY,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 20,
    }
    net = CLIPModel(CLIPConfig(text_config=words, vision_config=tower))
    return net, net.text_model


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    net = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, **sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0
        )
    )
    return net, net.encoder


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    net = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes, max_position_embeddings=32))
    return net, net.bert


QWEN: tuple[Maker, ...] = (qwen2, qwen3, internvl, qwen2_vl, qwen2_5_vl)


def save(make: Maker, path: Path) -> tuple[nn.Module, nn.Module]:
    """A random checkpoint and its tokenizer in `path`; returns the whole and its language model
    or encoder.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, part = make()
    net.eval().save_pretrained(path)
    # transformers takes any Qwen's to be BPE
    (chat_tokenizer() if make in QWEN else word_tokenizer()).save_pretrained(path)
    return net, part
