"""LangChain: documents at once, queries one by one, both ways of calling."""

import asyncio
import json
import sys

from langchain_openai import OpenAIEmbeddings

texts = json.load(sys.stdin)
embeddings = OpenAIEmbeddings(
    model="all-MiniLM-L6-v2", base_url=sys.argv[1], api_key=sys.argv[2], check_embedding_ctx_length=False
)
documents = embeddings.embed_documents(texts)
assert embeddings.embed_query(texts[0]) is not None
assert len(asyncio.run(embeddings.aembed_documents(texts))) == len(texts)
print(json.dumps(documents))
