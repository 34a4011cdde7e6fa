// openai-node: base64 behind the scenes, as it asks for by itself.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3] });
const input = JSON.parse(readFileSync(0, "utf8"));
const reply = await client.embeddings.create({ model: "all-MiniLM-L6-v2", input });
console.log(JSON.stringify(reply.data.map((row) => row.embedding)));
