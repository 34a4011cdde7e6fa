"""openai-python: base64 behind the scenes, as it asks for by itself."""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2])
reply = client.embeddings.create(model="all-MiniLM-L6-v2", input=json.load(sys.stdin))
print(json.dumps([row.embedding for row in reply.data]))
