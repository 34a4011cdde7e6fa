"""Cohere's client, both versions of it: the service in the place of Cohere's own."""

import json
import sys

import cohere

asked = json.load(sys.stdin)
clients = [kind(api_key=sys.argv[2], base_url=sys.argv[1]) for kind in (cohere.ClientV2, cohere.Client)]
first, second = [client.rerank(model="tiny-reranker", **asked).results for client in clients]
assert [(it.index, it.relevance_score) for it in first] == [(it.index, it.relevance_score) for it in second]
texts = clients[1].rerank(model="tiny-reranker", return_documents=True, top_n=1, **asked).results
assert texts[0].document.text == asked["documents"][first[0].index]
print(json.dumps([[it.index, it.relevance_score] for it in first]))
