"""LangChain: CohereRerank, as a retriever uses it, with the service in the place of Cohere's own."""

import json
import sys

from langchain_cohere import CohereRerank
from langchain_core.documents import Document

asked = json.load(sys.stdin)
reranker = CohereRerank(model="tiny-reranker", base_url=sys.argv[1], cohere_api_key=sys.argv[2], top_n=100)
documents = [Document(page_content=text, metadata={"at": at}) for at, text in enumerate(asked["documents"])]
kept = reranker.compress_documents(documents, asked["query"])
print(json.dumps([[it.metadata["at"], it.metadata["relevance_score"]] for it in kept]))
