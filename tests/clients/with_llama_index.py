"""LlamaIndex: texts in batches, and a query."""

import json
import sys

from llama_index.embeddings.openai import OpenAIEmbedding

texts = json.load(sys.stdin)
embedding = OpenAIEmbedding(model_name="all-MiniLM-L6-v2", api_base=sys.argv[1], api_key=sys.argv[2])
first = embedding.get_query_embedding(texts[0])
print(json.dumps([first, *embedding.get_text_embedding_batch(texts[1:])]))
