"""LiteLLM, with the service as an OpenAI-compatible provider."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a price list
import litellm

reply = litellm.embedding(
    model="openai/all-MiniLM-L6-v2", api_base=sys.argv[1], api_key=sys.argv[2], input=json.load(sys.stdin)
)
print(json.dumps([row["embedding"] for row in reply.data]))
