//! Chats as the text that a model was made for, by the chat template beside its tokenizer: Jinja, rendered as transformers does.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

use super::files;
use crate::error::{Error, Result};

/// One turn.
#[derive(Clone, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl std::fmt::Debug for Message {
    /// Without what is said, which is private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Message").field("role", &self.role).field("bytes", &self.content.len()).finish()
    }
}

/// The chat template of a model.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos", &self.bos).field("eos", &self.eos).finish_non_exhaustive()
    }
}

const NAME: &str = "chat";
const FILE: &str = "chat_template.jinja";
/// The largest template or `tokenizer_config.json` that is read, in bytes.
const LIMIT: u64 = 16 << 20;
/// Steps of a template: it comes from somebody else, and may loop.
const FUEL: u64 = 5_000_000;

impl ChatTemplate {
    /// That of the model in `dir`: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file that is no template or cannot be read; [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer_config.json");
        let config = match files::read_optional(&path, LIMIT)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Model(format!("{}: is not JSON ({e}); fetch it again", path.display())))?,
            None => serde_json::Value::Null,
        };
        let file = dir.join(FILE);
        let source = match files::read_optional(&file, LIMIT)? {
            Some(bytes) => {
                let wrong = |_| Error::Model(format!("{}: is not UTF-8; fetch it again", file.display()));
                Some(String::from_utf8(bytes).map_err(wrong)?)
            }
            // One template, or several with names, of which `default` is for chats.
            None => match &config["chat_template"] {
                serde_json::Value::String(text) => Some(text.clone()),
                serde_json::Value::Array(all) => {
                    let default = all.iter().find(|t| t["name"] == "default");
                    default.and_then(|t| t["template"].as_str()).map(str::to_owned)
                }
                _ => None,
            },
        };
        let Some(source) = source else { return Ok(None) };
        let token = |name: &str| {
            let value = &config[name];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
        };
        let wrong = |e| Error::Model(format!("{}: chat_template: {e}", dir.display()));
        Self::new(source, token("bos_token"), token("eos_token")).map(Some).map_err(wrong)
    }

    fn new(source: String, bos: String, eos: String) -> std::result::Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        let raise = |text: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        };
        environment.add_function("raise_exception", raise);
        environment.add_function("strftime_now", now);
        environment.add_filter("tojson", json);
        environment.set_fuel(Some(FUEL));
        environment.add_template_owned(NAME, source)?;
        Ok(ChatTemplate { environment, bos, eos })
    }

    /// The text of a chat, with the beginning of the answer if `answer`.
    ///
    /// # Errors
    /// What the template says is wrong with it.
    pub fn render(&self, messages: &[Message], answer: bool) -> std::result::Result<String, String> {
        let render = || {
            self.environment.get_template(NAME)?.render(context! {
                messages => Value::from(Serde(messages)),
                add_generation_prompt => answer,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
                // Always there with transformers.
                tools => (),
                documents => (),
            })
        };
        // Without the template's context, which may quote the chat.
        render().map_err(|e| format!("the chat template fails: {}", e.detail().unwrap_or("it has a defect")))
    }
}

/// Today, by Python's `strftime` (UTC).
fn now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let wrong = |e: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}"));
    let items = time::format_description::parse_strftime_borrowed(format).map_err(|e| wrong(e.to_string()))?;
    time::OffsetDateTime::now_utc().format(&items).map_err(|e| wrong(e.to_string()))
}

/// As Python's `json.dumps(value, ensure_ascii=False)`, which does not escape what HTML would need, unlike minijinja's own.
fn json(value: &Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let wrong = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    let written = match indent {
        Some(n) => {
            let indent = " ".repeat(n.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|e| wrong(e.to_string()))?;
    String::from_utf8(out).map_err(|e| wrong(e.to_string()))
}

/// Python's separators: a space after each comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What transformers made of the same templates and chats (tests/fixtures/chat/make.py).
    #[test]
    fn chats_are_rendered_as_transformers_does() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat/chats.json");
        let all: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for case in all["cases"].as_array().unwrap() {
            let source = all["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
            let template = ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).unwrap();
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            match (template.render(&messages, case["answer"] == true), case["text"].as_str(), case["refused"].as_str())
            {
                (Ok(text), Some(want), None) => assert_eq!(text, want, "{case}"),
                (Err(e), None, Some(why)) => assert!(e.contains(why), "{e}: {case}"),
                (got, ..) => panic!("{got:?}: {case}"),
            }
        }
    }

    #[test]
    fn what_a_template_refuses_is_said() {
        let source = "{% for m in messages %}{% if m.role == 'fool' %}{{ raise_exception('no fool') }}{% endif %}{{ m.content }}{% endfor %}";
        let template = ChatTemplate::new(source.into(), String::new(), String::new()).unwrap();
        let say = |role: &str| [Message { role: role.into(), content: "a secret".into() }];
        assert_eq!(template.render(&say("user"), true).unwrap(), "a secret");
        let e = template.render(&say("fool"), true).unwrap_err();
        assert!(e.contains("no fool") && !e.contains("secret"), "{e}");
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let source = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(source.into(), String::new(), String::new()).unwrap();
        assert!(template.render(&[], true).is_err());
    }

    #[test]
    fn json_and_dates_as_in_python() {
        let source = "{{ {'a': [1, 'x<y & \"z\"'], 'b': none} | tojson }} {{ strftime_now('%Y') | length }}";
        let template = ChatTemplate::new(source.into(), String::new(), String::new()).unwrap();
        assert_eq!(template.render(&[], true).unwrap(), r#"{"a": [1, "x<y & \"z\""], "b": null} 4"#);
    }

    #[test]
    fn a_model_without_a_template_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::open(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join(FILE), "{% for %}").unwrap();
        let e = ChatTemplate::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("chat_template"), "{e}");
    }
}
