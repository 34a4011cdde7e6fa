"""Haystack: documents in a pipeline's embedder, and a query's text."""

import json
import os
import sys

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret

texts = json.load(sys.stdin)
settings = {"model": "all-MiniLM-L6-v2", "api_base_url": sys.argv[1], "api_key": Secret.from_token(sys.argv[2])}
first = OpenAITextEmbedder(**settings).run(texts[0])["embedding"]
documents = OpenAIDocumentEmbedder(**settings, progress_bar=False).run([Document(content=text) for text in texts[1:]])
print(json.dumps([first, *(document.embedding for document in documents["documents"])]))
