//! Requests and answers in OpenAI's form, as far as they can be served privately. What would change the answer and cannot be done is
//! refused by name; what nobody knows is ignored, as clients send more fields every year.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::client::{Prompt, Request};
use crate::model::chat::Message;

/// What is wrong with a request.
#[derive(Debug, PartialEq)]
pub(super) struct Wrong {
    pub param: &'static str,
    pub text: String,
}

fn wrong<T>(param: &'static str, text: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong { param, text: text.into() })
}

/// A request, understood.
#[derive(Debug)]
pub(super) struct Asked {
    pub request: Request,
    pub model: Option<String>,
    pub stream: bool,
    pub include_usage: bool,
}

/// Fields by which an answer would differ, the values that change nothing, and why they are refused otherwise.
const REFUSED: [(&str, &[&str], &str); 19] = [
    ("n", &["1"], "one answer a request: send it several times, with other seeds"),
    ("best_of", &["1"], "it compares answers by their probabilities, which are not opened"),
    ("tools", &["[]"], "tool calls need a constrained decoder, which would have to see the logits"),
    (
        "tool_choice",
        &["\"none\"", "\"auto\""],
        "tool calls need a constrained decoder, which would have to see the logits",
    ),
    ("functions", &["[]"], "function calls need a constrained decoder, which would have to see the logits"),
    (
        "function_call",
        &["\"none\"", "\"auto\""],
        "function calls need a constrained decoder, which would have to see the logits",
    ),
    ("response_format", &["{\"type\":\"text\"}"], "a constrained decoder would have to see the logits"),
    ("logprobs", &["false", "0"], "probabilities are not opened to anybody: they give the model away"),
    ("top_logprobs", &["0"], "probabilities are not opened to anybody: they give the model away"),
    ("logit_bias", &["{}"], "the owner would learn the tokens that it is about"),
    ("top_p", &["1", "1.0"], "the noise for sampling is added to all logits under masks; use temperature"),
    ("top_k", &["-1", "0"], "the noise for sampling is added to all logits under masks; use temperature"),
    ("min_p", &["0", "0.0"], "the noise for sampling is added to all logits under masks; use temperature"),
    ("presence_penalty", &["0", "0.0"], "the owner would learn the tokens of the answer"),
    ("frequency_penalty", &["0", "0.0"], "the owner would learn the tokens of the answer"),
    ("repetition_penalty", &["1", "1.0"], "the owner would learn the tokens of the answer"),
    ("suffix", &["\"\""], "the model continues text, it fills no gaps"),
    ("audio", &[], "text only"),
    ("modalities", &["[\"text\"]"], "text only"),
];

fn refuse(fields: &Map<String, Value>) -> Result<(), Wrong> {
    for (name, harmless, why) in REFUSED {
        match fields.get(name) {
            None | Some(Value::Null) => {}
            Some(value) if harmless.contains(&value.to_string().as_str()) => {}
            Some(_) => return wrong(name, format!("`{name}` is not supported: {why}")),
        }
    }
    Ok(())
}

/// A field of a type; null is left out.
fn field<T: for<'a> Deserialize<'a>>(
    fields: &Map<String, Value>,
    name: &'static str,
    what: &str,
) -> Result<Option<T>, Wrong> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match T::deserialize(value) {
            Ok(v) => Ok(Some(v)),
            // Not the cause: it quotes the value.
            Err(_) => wrong(name, format!("`{name}`: expected {what}")),
        },
    }
}

fn common(fields: &Map<String, Value>, prompt: Prompt, max_tokens: Option<usize>) -> Result<Asked, Wrong> {
    refuse(fields)?;
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stop {
        One(String),
        More(Vec<String>),
    }
    let stop = match field(fields, "stop", "a text, or up to 4 of them")? {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::More(texts)) => texts,
    };
    if stop.len() > 4 {
        return wrong("stop", "`stop`: at most 4 texts");
    }
    let temperature: f64 = field(fields, "temperature", "a number")?.unwrap_or(1.0);
    // A number of either sign, as OpenAI's; only its bits matter.
    let seed = field::<i64>(fields, "seed", "an integer")?.map(|seed| seed as u64);
    let options: Option<Map<String, Value>> = field(fields, "stream_options", "an object")?;
    let include_usage = match options {
        Some(options) => field(&options, "include_usage", "true or false")?.unwrap_or(false),
        None => false,
    };
    Ok(Asked {
        request: Request { prompt, max_tokens, temperature, seed, stop, caller: 0 },
        model: field(fields, "model", "a text")?,
        stream: field(fields, "stream", "true or false")?.unwrap_or(false),
        include_usage,
    })
}

/// The body of `/v1/chat/completions`.
pub(super) fn chat(fields: &Map<String, Value>) -> Result<Asked, Wrong> {
    #[derive(Deserialize)]
    struct Turn {
        role: String,
        content: Option<Content>,
        tool_calls: Option<Value>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Content {
        Text(String),
        Parts(Vec<Part>),
    }
    #[derive(Deserialize)]
    struct Part {
        r#type: String,
        text: Option<String>,
    }
    let turns: Vec<Turn> = match field(fields, "messages", "a list of {\"role\": .., \"content\": ..}")? {
        Some(turns) => turns,
        None => {
            return wrong(
                "messages",
                "`messages` is missing: give the chat as a list of {\"role\": .., \"content\": ..}",
            );
        }
    };
    if turns.is_empty() {
        return wrong("messages", "`messages` is empty: give at least one");
    }
    let mut messages = Vec::with_capacity(turns.len());
    for turn in turns {
        if turn.role == "tool" || turn.tool_calls.is_some() {
            return wrong("messages", "`messages`: tool calls are not supported, so there are none to continue from");
        }
        let content = match turn.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut all = String::new();
                for part in parts {
                    match part.text.filter(|_| part.r#type == "text") {
                        Some(text) => all += &text,
                        None => return wrong("messages", "`messages`: only parts of type `text` can be understood"),
                    }
                }
                all
            }
            None => String::new(),
        };
        // What templates know newer clients' word for it by.
        let role = if turn.role == "developer" { "system".to_owned() } else { turn.role };
        messages.push(Message { role, content });
    }
    let most = "a positive number of tokens";
    let max = field(fields, "max_completion_tokens", most)?;
    let max = max.map_or_else(|| field(fields, "max_tokens", most), |n| Ok(Some(n)))?;
    common(fields, Prompt::Chat(messages), max)
}

/// The body of `/v1/completions`.
pub(super) fn completion(fields: &Map<String, Value>) -> Result<Asked, Wrong> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        Text(String),
        Tokens(Vec<u32>),
        Texts(Vec<String>),
        Lists(Vec<Vec<u32>>),
    }
    if fields.get("echo").is_some_and(|echo| *echo != Value::Bool(false) && !echo.is_null()) {
        return wrong("echo", "`echo` is not supported: the prompt is at hand where it was sent from");
    }
    if fields.get("logprobs").is_some_and(|n| !n.is_null()) {
        return wrong(
            "logprobs",
            "`logprobs` is not supported: probabilities are not opened to anybody: they give the model away",
        );
    }
    let prompt = match field(fields, "prompt", "a text, or a list of tokens")? {
        Some(Given::Text(text)) => Prompt::Text(text),
        Some(Given::Tokens(ids)) => Prompt::Tokens(ids),
        Some(Given::Texts(texts)) if texts.len() == 1 => Prompt::Text(texts.into_iter().next().unwrap_or_default()),
        Some(Given::Lists(lists)) if lists.len() == 1 => Prompt::Tokens(lists.into_iter().next().unwrap_or_default()),
        Some(_) => return wrong("prompt", "`prompt`: one prompt a request; send several requests"),
        None => return wrong("prompt", "`prompt` is missing: give the text to continue"),
    };
    // What OpenAI's takes when nothing is said.
    let max = field(fields, "max_tokens", "a positive number of tokens")?.unwrap_or(16);
    common(fields, prompt, Some(max))
}

/// An error in OpenAI's form.
pub(super) fn error(kind: &str, code: Option<&str>, param: Option<&str>, message: &str) -> Value {
    json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
}

/// Tokens that a request took.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

/// What all chunks of an answer share.
#[derive(Clone)]
pub(super) struct Envelope {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub chat: bool,
    /// Chunks say `"usage": null` until the last one, which has it.
    pub include_usage: bool,
}

impl Envelope {
    fn object(&self, kind: &str, choices: Value, usage: Option<Usage>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("trefoil-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
            "usage": usage,
        })
    }

    /// A whole answer.
    pub fn whole(&self, text: &str, finish: &str, usage: Usage) -> Value {
        let (kind, mut choice) = match self.chat {
            true => ("chat.completion", json!({"message": {"role": "assistant", "content": text, "refusal": null}})),
            false => ("text_completion", json!({"text": text})),
        };
        choice["index"] = 0.into();
        choice["finish_reason"] = finish.into();
        choice["logprobs"] = Value::Null;
        self.object(kind, json!([choice]), Some(usage))
    }

    fn chunk(&self, choices: Value, usage: Option<Usage>) -> Value {
        let mut chunk =
            self.object(if self.chat { "chat.completion.chunk" } else { "text_completion" }, choices, usage);
        if !self.include_usage
            && let Value::Object(fields) = &mut chunk
        {
            fields.remove("usage");
        }
        chunk
    }

    /// The first chunk of a chat says who speaks.
    pub fn opening(&self) -> Option<Value> {
        let choice =
            json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null});
        self.chat.then(|| self.chunk(json!([choice]), None))
    }

    /// A piece.
    pub fn piece(&self, text: &str) -> Value {
        let choice = match self.chat {
            true => json!({"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": null}),
            false => json!({"index": 0, "text": text, "logprobs": null, "finish_reason": null}),
        };
        self.chunk(json!([choice]), None)
    }

    /// The last chunk, and that of the usage, if it was asked for.
    pub fn closing(&self, finish: &str, usage: Usage) -> Vec<Value> {
        let choice = match self.chat {
            true => json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": finish}),
            false => json!({"index": 0, "text": "", "logprobs": null, "finish_reason": finish}),
        };
        let mut out = vec![self.chunk(json!([choice]), None)];
        if self.include_usage {
            out.push(self.chunk(json!([]), Some(usage)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(f: fn(&Map<String, Value>) -> Result<Asked, Wrong>, body: Value) -> Result<Asked, Wrong> {
        let Value::Object(fields) = body else { panic!("no object") };
        f(&fields)
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name_and_only_then() {
        for (name, harmless, _) in REFUSED {
            let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
            for value in harmless {
                body[name] = serde_json::from_str(value).unwrap();
                assert!(parse(chat, body.clone()).is_ok(), "{name} {value}");
            }
            body[name] = Value::Null;
            assert!(parse(chat, body.clone()).is_ok(), "{name}");
            body[name] = json!({"something": "else"});
            let e = parse(chat, body).unwrap_err();
            assert_eq!(e.param, name);
            assert!(e.text.contains(name), "{}", e.text);
        }
    }

    #[test]
    fn messages_in_all_their_forms() {
        let asked = parse(
            chat,
            json!({
                "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null, "name": "x"}], "stop": "S", "seed": -1, "max_completion_tokens": 3, "max_tokens": 9,
                "stream": true, "stream_options": {"include_usage": true}, "temperature": 0, "user": "u", "new_field": {}
            }),
        )
        .unwrap();
        let Prompt::Chat(messages) = &asked.request.prompt else { panic!("no chat") };
        assert_eq!(messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>(), ["ab", ""]);
        let r = &asked.request;
        assert_eq!(
            (r.max_tokens, r.seed, r.temperature, r.stop.as_slice()),
            (Some(3), Some(u64::MAX), 0.0, &["S".to_owned()][..])
        );
        assert!(asked.stream && asked.include_usage && asked.model.as_deref() == Some("m"));
        for (body, param) in [
            (json!({}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages"),
            (json!({"messages": [{"role": "user", "content": "a"}], "stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}), "max_tokens"),
            (json!({"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}), "temperature"),
        ] {
            assert_eq!(parse(chat, body.clone()).unwrap_err().param, param, "{body}");
        }
    }

    #[test]
    fn prompts_in_all_their_forms() {
        for (given, ok) in [
            (json!("a"), true),
            (json!([1, 2]), true),
            (json!(["a"]), true),
            (json!([[1]]), true),
            (json!(["a", "b"]), false),
            (json!({}), false),
            (json!([-1]), false),
        ] {
            assert_eq!(parse(completion, json!({"prompt": given})).is_ok(), ok, "{given}");
        }
        assert_eq!(parse(completion, json!({"prompt": "a"})).unwrap().request.max_tokens, Some(16));
        assert_eq!(parse(completion, json!({"prompt": "a", "echo": true})).unwrap_err().param, "echo");
    }
}
