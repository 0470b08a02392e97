"""The official `openai` package against the gateway: the same tokens as `trefoil generate`, whole and streamed."""
import json
import sys

import openai

url, want = sys.argv[1], json.load(open(sys.argv[2]))["text"]
client = openai.OpenAI(base_url=url + "/v1", api_key="none needed", max_retries=0)
[model] = list(client.models.list())
prompt = "It was a bright morning"
ask = dict(model=model.id, max_tokens=12, temperature=0)
messages = [{"role": "user", "content": prompt}]

whole = client.chat.completions.create(messages=messages, **ask)
assert whole.choices[0].message.content == want, whole
assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12, whole

stream = client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **ask)
chunks = list(stream)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and len(chunks) > 3

text = client.completions.create(prompt=prompt, **ask)
assert text.choices[0].text == want, text
assert "".join(c.choices[0].text for c in client.completions.create(prompt=prompt, stream=True, **ask)) == want

for wrong, error in [
    (dict(messages=messages, model="gpt-9"), openai.NotFoundError),
    (dict(messages=messages, model=model.id, tools=[{"type": "function", "function": {"name": "f"}}]), openai.BadRequestError),
    (dict(messages=[{"role": "user", "content": "word " * 2000}], model=model.id), openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**wrong)
    except error as e:
        assert e.body["message"], e
    else:
        raise AssertionError(wrong)
# A caller that leaves in the middle.
stream = client.chat.completions.create(messages=messages, stream=True, model=model.id, max_tokens=100)
next(iter(stream))
stream.close()
print(f"openai {openai.__version__}: chat, completions, streams, usage and errors are as expected")
