//! Chats to learn from: what the assistant says, told apart from what is said to it.

use serde::Deserialize;

use crate::model::chat::{ChatTemplate, Message};

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
}

/// The text of a chat (a line of JSON) in pieces, each with whether the assistant says it.
///
/// # Errors
/// What is wrong with the line, or how it does not go with the template.
pub(super) fn pieces(template: &ChatTemplate, line: &str) -> std::result::Result<Vec<(String, bool)>, String> {
    let chat: Chat = serde_json::from_str(line)
        .map_err(|e| format!("is no chat ({e}); give {{\"messages\": [{{\"role\": .., \"content\": ..}}, ..]}}"))?;
    let mut pieces = Vec::new();
    let mut done = String::new();
    for (i, _) in chat.messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
        for (messages, prompt) in [(&chat.messages[..i], true), (&chat.messages[..=i], false)] {
            let all = template.render(messages, prompt)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + message.role) }}{% endif %}\n    {{- '<|' + message['role'] + '|>' + message['content'].strip() + eos_token }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

    fn template() -> ChatTemplate {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), CHATML).unwrap();
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#,
        )
        .unwrap();
        ChatTemplate::open(dir.path()).unwrap().unwrap()
    }

    #[test]
    fn what_the_assistant_says_is_learned() {
        let line = r#"{"messages": [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ho"},
            {"role": "user", "content": "on"}, {"role": "assistant", "content": "off"}]}"#;
        let pieces = pieces(&template(), line).unwrap();
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
            let e = pieces(&template(), line).unwrap_err();
            assert!(e.contains(named), "{e}");
        }
    }
}
