"""Opens a cross-encoder: a transformer and the head that makes one score of its first token.

What comes out has the shape of a sentence-transformers model, modules after a transformer, so that both forwards run
it as they run an embedder. A head that computes anything but the model's own forward does is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from serve_app.encoders import SAME_LOGIT

_PROBE = 24  # tokens


class Backbone(torch.nn.Module):
    """The transformer, called as sentence-transformers calls it."""

    def __init__(self, auto_model: torch.nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, "token_embeddings": self.auto_model(**features).last_hidden_state}


class Score(torch.nn.Module):
    """What it says of a sequence, 0 to 1: [count, tokens, width] -> [count, 1]."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden)
        return logits

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": torch.sigmoid(self.logits(features["token_embeddings"]))}

    def get_config_dict(self) -> dict[str, Any]:
        """As sentence-transformers' modules have it: what a fingerprint is made from."""
        return {"layers": [type(layer).__name__ for layer in self.head.modules()], "activation": "sigmoid"}


class Reranker(torch.nn.Sequential):
    """Backbone and Score, and what else is asked of a SentenceTransformer."""

    def __init__(self, backbone: Backbone, score: Score, tokenizer: Any) -> None:
        super().__init__(backbone, score)
        self.tokenizer = tokenizer
        self.max_seq_length = tokenizer.model_max_length

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_embedding_dimension(self) -> int:
        return 1


def open_reranker(folder: Path, device: str, dtype: torch.dtype, *, trust_remote_code: bool) -> Reranker:
    """Raises ValueError if its files are no cross-encoder of one score, or one that is not known here."""
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **local
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"its files have no {missing[0]}: they are no cross-encoder's, which `task: rerank` asks for")
    if model.config.num_labels != 1:
        raise ValueError(f"its files say {model.config.num_labels} labels: a reranker has one, its score")
    model = model.to(device).eval()
    ids = torch.arange(_PROBE, device=device)[None] % 19 + 5
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        expected = model(**features).logits.float()
    backbone, score = Backbone(model.base_model), Score(_head(model))
    with torch.inference_mode():
        found = score.logits(backbone(features)["token_embeddings"])
    if float((found.float() - expected).abs().max()) > SAME_LOGIT:
        raise ValueError(f"a {type(model).__name__} makes its score in a way that is not done here")
    return Reranker(backbone, score, AutoTokenizer.from_pretrained(folder, **local))


def _head(model: Any) -> torch.nn.Module:
    """[count, tokens, width] -> [count, 1], and off the transformer: it is computed in float32, like any head."""
    match model.config.model_type:
        case "bert":
            pooler, model.base_model.pooler = model.base_model.pooler, None
            return torch.nn.Sequential(pooler, model.classifier)
        case "roberta" | "xlm-roberta":
            head: torch.nn.Module = model.classifier
            return head
        case other:
            raise ValueError(f"its architecture is {other}: of cross-encoders bert, roberta and xlm-roberta are known")
