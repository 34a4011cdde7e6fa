"""Models in published shapes with random weights, as sentence-transformers folders: nothing is downloaded.

What a forward costs depends on shapes alone. The tokenizer knows the words of `workloads.py`; `encoder.py` measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.utils import logging

from benchmark.workloads import WORDS
from serve_app.core.packing import TokenIds

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # RoBERTa's places: its positions count from behind <pad>
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a forward should reach, as far as anything is asked of this shape."""

    tokens_per_s: float = 0.0
    share: float = 0.0  # of the measured matrix rate
    ratio: float = 0.0  # to SentenceTransformer.encode, on mixed lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """sizes: in the words of the architecture's configuration. lengths: tokens of the texts that are measured."""

    architecture: str
    sizes: Mapping[str, int]
    pooling: str
    context: int
    lengths: tuple[int, ...]
    target: Target = field(default_factory=Target)

    def config(self) -> Any:
        sizes = {"vocab_size": 2048, **self.sizes}
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        return transformers.AutoConfig.for_model(self.architecture, **sizes, **special)


def _sizes(width: int, layers: int, heads: int, inner: int, positions: int, **others: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        **others,
    }


MINI = {
    "mini-bert": Shape(
        architecture="bert", sizes=_sizes(128, 2, 2, 512, 512), pooling="cls", context=512, lengths=(50, 512)
    ),
    "mini-xlm-r": Shape(
        architecture="xlm-roberta",
        sizes=_sizes(128, 2, 2, 512, 514, type_vocab_size=1),
        pooling="cls",
        context=512,
        lengths=(512,),
    ),
    "mini-qwen2": Shape(
        architecture="qwen2",
        sizes=_sizes(128, 2, 4, 512, 512, num_key_value_heads=2),
        pooling="lasttoken",
        context=512,
        lengths=(512,),
    ),
}
REAL = {
    "bert-base": Shape(  # 109 M: bge-base-en-v1.5, e5-base-v2
        architecture="bert",
        sizes=_sizes(768, 12, 12, 3072, 512, vocab_size=30_522),
        pooling="cls",
        context=512,
        lengths=(50, 512),
        target=Target(tokens_per_s=1.6e6, ratio=4.0),
    ),
    "xlm-r-large": Shape(  # 568 M: bge-m3
        architecture="xlm-roberta",
        sizes=_sizes(1024, 24, 16, 4096, 8194, vocab_size=250_002, type_vocab_size=1),
        pooling="cls",
        context=8192,
        lengths=(512,),
        target=Target(share=0.45),
    ),
    "qwen2-7b": Shape(  # 7.07 G without the language model's head: gte-Qwen2-7B-instruct
        architecture="qwen2",
        sizes=_sizes(3584, 28, 28, 18_944, 32_768, vocab_size=151_646, num_key_value_heads=4),
        pooling="lasttoken",
        context=8192,
        lengths=(512,),
        target=Target(share=0.6),
    ),
}
SHAPES = {**MINI, **REAL}


def make(folder: Path, shape: Shape, device: str) -> None:
    """Fills the folder. device: where the weights are drawn; seven billion take minutes on a CPU."""
    logging.disable_progress_bar()
    _tokenizer(shape.context).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        transformers.AutoModel.from_config(shape.config(), dtype=torch.bfloat16).save_pretrained(folder)
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    kinds = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
        for index, (path, module) in enumerate(modules.items())
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": shape.context}))
    modes = {"cls": "cls_token", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{mode}": name == shape.pooling for name, mode in modes.items()}
    pooling = {"word_embedding_dimension": shape.sizes["hidden_size"], "pooling_mode_mean_tokens": False, **flags}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _tokenizer(context: int) -> Any:
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *sorted({*WORDS} - {*LETTERS})]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=context,
    )


def flop_per_token(config: Any, lengths: TokenIds) -> float:
    """Of one forward over texts of these tokens: two for each weight of a linear layer, and attention's products.

    Embeddings, norms and what pools are not counted. A decoder's tokens see half of the others on average.
    """
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    weights: int = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "pool" not in name
    )
    seen = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    if config.model_type == "qwen2":
        seen /= 2
    width = head_width(config) * int(config.num_attention_heads)
    return 2.0 * weights + 4.0 * int(config.num_hidden_layers) * width * seen


def parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in transformers.AutoModel.from_config(config).parameters())


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
