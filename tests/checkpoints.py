"""Small checkpoints with random weights, as sentence-transformers folders: real architectures, nothing downloaded.

The same arguments give the same files. `python tests/checkpoints.py FOLDER ARCHITECTURE` makes one for a live server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it is read once

import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
VOCABULARY = 600  # entries: room for every letter and a few hundred syllables
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi")
WORDS = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]


def prose(words: int, chance: random.Random) -> str:
    """A text of so many words that every tokenizer here knows, with a comma and a full stop now and then."""
    return " ".join(chance.choice(WORDS) + chance.choice(("", "", "", "", "", ",", ".", "ing")) for _ in range(words))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one kind is configured, and which tokenizer its checkpoints bring."""

    sizes: Callable[[int, int], dict[str, Any]]  # (width, positions) -> what its configuration calls them
    tokenizer: Callable[[Sequence[str], int], Any]
    positions_before_text: int = 0  # RoBERTa and its kin count from padding_idx + 1
    weights: float = 0.25  # spread: ten times the usual, for untrained weights must still tell positions apart


def make_checkpoint(
    folder: Path,
    architecture: str,
    *,
    pooling: str = "mean",
    dimensions: int = 64,
    context: int = 128,
    seed: int = 0,
) -> Path:
    """The folder, filled. pooling: cls, mean, max, lasttoken. context: tokens per input, special ones included."""
    _make(folder, architecture, transformers.AutoModel, dimensions=dimensions, context=context, seed=seed)
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
            for index, (path, module) in enumerate(modules.items())
        ],
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": context, "do_lower_case": False})
    (folder / "2_Normalize").mkdir()
    set_pooling(folder, pooling, dimensions=dimensions)
    return folder


def make_reranker(
    folder: Path, architecture: str, *, labels: int = 1, dimensions: int = 64, context: int = 128, seed: int = 0
) -> Path:
    """A cross-encoder's folder, as transformers writes it. context: of query, document and special tokens together."""
    kind = transformers.AutoModelForSequenceClassification
    _make(folder, architecture, kind, dimensions=dimensions, context=context, seed=seed, num_labels=labels)
    return folder


def _make(
    folder: Path, architecture: str, model: Any, *, dimensions: int, context: int, seed: int, **settings: Any
) -> None:
    """Tokenizer, configuration and weights."""
    kind = ARCHITECTURES[architecture]
    folder.mkdir(parents=True)
    tokenizer = kind.tokenizer(_corpus(seed), context)
    tokenizer.save_pretrained(folder)
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        initializer_range=kind.weights,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **kind.sizes(dimensions, context + kind.positions_before_text),
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.from_config(config).save_pretrained(folder)


def set_pooling(folder: Path, pooling: str, *, dimensions: int) -> None:
    """(Re)write the checkpoint's pooling, in the words that published checkpoints use."""
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{mode}": name == pooling for name, mode in modes.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dimensions, **flags})


def reference(folder: Path) -> SentenceTransformer:
    """sentence-transformers itself, in float32 on the CPU: what every encoder path is held against."""
    return SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    ).eval()


def _corpus(seed: int) -> list[str]:
    chance = random.Random(seed)
    return [prose(12, chance) for _ in range(400)]


def _word_piece(kind: type[Any], special: Sequence[str]) -> Callable[[Sequence[str], int], Any]:
    def train(corpus: Sequence[str], context: int) -> Any:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=VOCABULARY, special_tokens=list(special), initial_alphabet=list(_ALPHABET), show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        pieces = sorted(set(_model(tokenizer)["vocab"]) - set(special))  # the trainer numbers letters by chance
        vocabulary = {piece: id for id, piece in enumerate([*special, *pieces])}
        return kind(vocab=vocabulary, model_max_length=context)

    return train


def _byte_level(corpus: Sequence[str], context: int) -> Any:
    model = _byte_pairs(corpus, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=context)


def _byte_pairs(corpus: Sequence[str], special: list[str]) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return _model(tokenizer)


def _framed(first: str, last: str, pad: str, *, padding_side: str) -> Callable[[Sequence[str], int], Any]:
    """Byte pairs between a first and a last token, as the newer models have it: `first` may be nothing."""

    def train(corpus: Sequence[str], context: int) -> Any:
        special = sorted({token for token in (first, last, pad) if token})
        model = _byte_pairs(corpus, special)
        merges = [tuple(merge) for merge in model["merges"]]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}".strip(),
            pair=f"{first} $A {last} $B:1 {last}:1".strip(),
            special_tokens=[(token, model["vocab"][token]) for token in special],
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=first or None,
            eos_token=last,
            pad_token=pad,
            padding_side=padding_side,
            model_max_length=context,
        )

    return train


def _unigram(corpus: Sequence[str], context: int) -> Any:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ("<s>", "<pad>", "</s>", "<unk>")
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        unk_token="<unk>",
        initial_alphabet=list(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # The trainer adds up in any order: who goes first, and the last digits of a score, are chance.
    pieces = sorted((piece, round(score, 1)) for piece, score in _model(tokenizer)["vocab"] if piece not in special)
    vocabulary = [*((piece, 0.0) for piece in special), *pieces, ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=context)


def _model(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _bert_sizes(width: int, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "intermediate_size": 2 * width,
        "max_position_embeddings": positions,
    }


def _roberta_sizes(width: int, positions: int) -> dict[str, Any]:
    """As published: one type of token, for pairs, too."""
    return {**_bert_sizes(width, positions), "type_vocab_size": 1}


def _distilbert_sizes(width: int, positions: int) -> dict[str, Any]:
    return {
        "dim": width,
        "n_layers": 2,
        "n_heads": width // 16,
        "hidden_dim": 2 * width,
        "max_position_embeddings": positions,
    }


def _modern_sizes(width: int, positions: int) -> dict[str, Any]:
    """A layer that sees everything, two that see 16 tokens either side, and one of the former again."""
    unused = {"cls_token_id": None, "sep_token_id": None}
    return {**_bert_sizes(width, positions), "num_hidden_layers": 4, "local_attention": 32, **unused}


def _decoder_sizes(width: int, positions: int) -> dict[str, Any]:
    """Two query heads share a key head."""
    heads = width // 16
    return {**_bert_sizes(width, positions), "num_key_value_heads": heads // 2, "head_dim": 16}


def _mistral_sizes(width: int, positions: int) -> dict[str, Any]:
    return {**_decoder_sizes(width, positions), "sliding_window": positions // 4}


_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MPNET_SPECIAL = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
_BERT_PIECES = _word_piece(transformers.BertTokenizer, _BERT_SPECIAL)
ARCHITECTURES = {
    "bert": Architecture(sizes=_bert_sizes, tokenizer=_BERT_PIECES),
    "distilbert": Architecture(
        sizes=_distilbert_sizes, tokenizer=_word_piece(transformers.DistilBertTokenizer, _BERT_SPECIAL)
    ),
    "gte": Architecture(sizes=_bert_sizes, tokenizer=_unigram),
    "mistral": Architecture(
        sizes=_mistral_sizes, tokenizer=_framed("<s>", "</s>", "<pad>", padding_side="left"), weights=0.12
    ),
    "modernbert": Architecture(sizes=_modern_sizes, tokenizer=_framed("[CLS]", "[SEP]", "[PAD]", padding_side="right")),
    "mpnet": Architecture(
        sizes=_bert_sizes,
        tokenizer=_word_piece(transformers.MPNetTokenizer, _MPNET_SPECIAL),
        positions_before_text=2,
    ),
    "nomic_bert": Architecture(sizes=_bert_sizes, tokenizer=_BERT_PIECES),
    "qwen2": Architecture(
        sizes=_decoder_sizes, tokenizer=_framed("", "<|endoftext|>", "<|endoftext|>", padding_side="left")
    ),
    "qwen3": Architecture(
        sizes=_decoder_sizes, tokenizer=_framed("", "<|endoftext|>", "<|endoftext|>", padding_side="left")
    ),
    "roberta": Architecture(sizes=_roberta_sizes, tokenizer=_byte_level, positions_before_text=2),
    "xlm-roberta": Architecture(sizes=_roberta_sizes, tokenizer=_unigram, positions_before_text=2),
}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Make a small embedder with random weights.")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("architecture", choices=sorted(ARCHITECTURES))
    arguments.add_argument("--pooling", default="mean")
    arguments.add_argument("--dimensions", type=int, default=64)
    arguments.add_argument("--context", type=int, default=128)
    arguments.add_argument("--seed", type=int, default=0)
    make_checkpoint(**vars(arguments.parse_args()))
