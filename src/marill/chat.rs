//! Chats as the text that a model was made for, by the chat template beside its tokenizer: Jinja, rendered as transformers does.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
}

/// The chat template of a model.
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("bos", &self.bos).field("eos", &self.eos).finish_non_exhaustive()
    }
}

const NAME: &str = "chat";

impl Template {
    /// That of the model in `dir`: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is none or it is no template; [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        let none = || {
            Error::Config(format!(
                "--data: chats need a chat template, and {} has none; give a base that has one (instruction-tuned models do), or plain text",
                path.display()
            ))
        };
        let config: serde_json::Value = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Model(format!("{}: is not JSON ({e}); fetch it again", path.display())))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
            Err(e) => return Err(Error::io(path.display().to_string(), e)),
        };
        let source = match std::fs::read_to_string(dir.join("chat_template.jinja")) {
            Ok(text) => text,
            // One template, or several with names, of which `default` is for chats.
            Err(_) => match &config["chat_template"] {
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Array(all) => all
                    .iter()
                    .find(|t| t["name"] == "default")
                    .and_then(|t| t["template"].as_str())
                    .ok_or_else(none)?
                    .to_owned(),
                _ => return Err(none()),
            },
        };
        let token = |name: &str| {
            let value = &config[name];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
        };
        Self::new(source, token("bos_token"), token("eos_token"))
            .map_err(|e| Error::Config(format!("{}: chat_template: {e}", dir.display())))
    }

    fn new(source: String, bos: String, eos: String) -> std::result::Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let raise = |text: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        };
        environment.add_function("raise_exception", raise);
        environment.add_template_owned(NAME, source)?;
        Ok(Template { environment, bos, eos })
    }

    fn render(&self, messages: &[Message], prompt: bool) -> std::result::Result<String, String> {
        let render = || {
            self.environment.get_template(NAME)?.render(context! {
                messages => Value::from(Serde(messages)),
                add_generation_prompt => prompt,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
            })
        };
        render().map_err(|e| format!("the chat template fails: {e}"))
    }

    /// The text of a chat (a line of JSON) in pieces, each with whether the assistant says it.
    ///
    /// # Errors
    /// What is wrong with the line, or how it does not go with the template.
    pub fn pieces(&self, line: &str) -> std::result::Result<Vec<(String, bool)>, String> {
        let chat: Chat = serde_json::from_str(line)
            .map_err(|e| format!("is no chat ({e}); give {{\"messages\": [{{\"role\": .., \"content\": ..}}, ..]}}"))?;
        let mut pieces = Vec::new();
        let mut done = String::new();
        for (i, _) in chat.messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            for (messages, prompt) in [(&chat.messages[..i], true), (&chat.messages[..=i], false)] {
                let all = self.render(messages, prompt)?;
                let Some(new) = all.strip_prefix(done.as_str()) else {
                    return Err("the chat template rewrites earlier turns, so what the assistant says cannot be told \
                        apart; give chats with one answer each"
                        .into());
                };
                pieces.push((new.to_owned(), !prompt));
                done = all;
            }
        }
        if pieces.is_empty() {
            return Err("has no message of the assistant, so there is nothing to learn".into());
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + message.role) }}{% endif %}\n    {{- '<|' + message['role'] + '|>' + message['content'].strip() + eos_token }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

    fn template() -> Template {
        Template::new(CHATML.into(), "<s>".into(), "</s>".into()).unwrap()
    }

    #[test]
    fn what_the_assistant_says_is_learned() {
        let line = r#"{"messages": [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ho"},
            {"role": "user", "content": "on"}, {"role": "assistant", "content": "off"}]}"#;
        let pieces = template().pieces(line).unwrap();
        let want = [
            ("<s><|user|>hi</s><|assistant|>", false),
            ("ho</s>", true),
            ("<|user|>on</s><|assistant|>", false),
            ("off</s>", true),
        ];
        assert_eq!(pieces, want.map(|(text, learned)| (text.to_owned(), learned)));
    }

    #[test]
    fn what_is_no_chat_is_refused() {
        for (line, named) in [
            ("hello", "is no chat"),
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "nothing to learn"),
            (r#"{"messages": [{"role": "fool", "content": "a"}, {"role": "assistant", "content": "b"}]}"#, "no fool"),
        ] {
            let e = template().pieces(line).unwrap_err();
            assert!(e.contains(named), "{e}");
        }
    }

    #[test]
    fn a_model_without_a_template_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let e = Template::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("chat template") && e.contains("tokenizer_config.json"), "{e}");
    }
}
