//! Labelled texts: what is read, how it is split, and what is refused.

use std::path::Path;

use super::text::TextBackbone;
use super::texts::{TextSet, Vocabulary, samples};

fn backbone(window: usize) -> TextBackbone {
    TextBackbone::open(Path::new("models/quill-4m"), window).unwrap()
}

fn refused(b: &TextBackbone, path: &Path, want: &str) {
    let error = TextSet::read(path, b, 0).unwrap_err().to_string();
    assert!(error.contains(want), "{want}: {error}");
}

#[test]
fn folders_of_texts() {
    let (b, dir) = (backbone(8), tempfile::tempdir().unwrap());
    let write = |path: &str, text: &[u8]| std::fs::write(dir.path().join(path), text).unwrap();
    for label in ["sea", "home"] {
        std::fs::create_dir(dir.path().join(label)).unwrap();
        for n in 0..10 {
            write(&format!("{label}/{n}.txt"), format!("In the {label} there are {n} things.").as_bytes());
        }
        write(&format!("{label}/notes.md"), b"no text");
    }
    let set = TextSet::read(dir.path(), &b, 0).unwrap();
    assert_eq!(set.labels, ["home", "sea"]);
    assert_eq!((set.train.len(), set.test.len()), (16, 4));
    assert_eq!(set, TextSet::read(dir.path(), &b, 0).unwrap());
    assert!(set != TextSet::read(dir.path(), &b, 1).unwrap());
    assert!(set.test.iter().all(|e| e.ids.len() == 8 && !set.train.contains(e)));
    assert!(!format!("{set:?}").contains("ids"));
    let other = set.clone().relabelled(&["sea".into(), "air".into(), "home".into()]).unwrap();
    assert!(other.train.iter().zip(&set.train).all(|(a, b)| a.label == [2, 0][b.label]));
    let error = set.relabelled(&["sea".into()]).unwrap_err().to_string();
    assert!(error.contains("`home` is none of the adapter's"), "{error}");
    let (windows, from) = samples(Some(dir.path()), &b, 8).unwrap();
    assert!(windows.len() <= 8 && windows.len() > 4 && from.contains("windows of"), "{from}");

    refused(&b, &dir.path().join("sea"), "one folder of .txt files per label");
    refused(&b, &dir.path().join("none"), "neither a directory");
    write("sea/a.txt", b"");
    refused(&b, dir.path(), "a.txt: the text is empty");
    write("sea/a.txt", b"x\xff");
    refused(&b, dir.path(), "not UTF-8 from byte 1");
    std::fs::remove_file(dir.path().join("sea/a.txt")).unwrap();
    std::fs::create_dir(dir.path().join("void")).unwrap();
    refused(&b, dir.path(), "fewer than two .txt files");
}

#[test]
fn lines_of_json() {
    let (b, dir) = (backbone(8), tempfile::tempdir().unwrap());
    let path = dir.path().join("texts.jsonl");
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    let good = "{\"text\": \"the sea\", \"label\": \"b\"}\n{\"text\": \"a boat\", \"label\": \"b\"}\n";
    let others = "\n{\"text\": \"a house\", \"label\": 7}\n{\"text\": \"the door\", \"label\": 7}\n";
    write(&format!("{good}{others}"));
    let set = TextSet::read(&path, &b, 0).unwrap();
    assert_eq!((set.labels.as_slice(), set.train.len(), set.test.len()), (&["7".to_owned(), "b".into()][..], 2, 2));
    assert_eq!(samples(Some(&path), &b, 8).unwrap().0.len(), 4);
    for (text, want) in [
        ("", "is empty; give a line"),
        (good, "the only label is `b`"),
        ("{\"text\": \"secret\", \"label\": \"a\"}\n{\"text\": \"secret\"", "line 2: is no JSON"),
        ("\n{\"text\": \"secret\"}", "line 2: has no field \"label\""),
        ("{\"label\": \"secret\"}", "line 1: has no field \"text\""),
        ("[\"secret\"]", "line 1: has no field \"text\""),
        ("{\"text\": [\"secret\"], \"label\": 1}", "line 1: \"text\" is no text"),
        ("{\"text\": \"secret\", \"label\": 1.5}", "line 1: \"label\" is no text"),
        ("{\"text\": \"\", \"label\": \"a\"}", "line 1: the text is empty"),
    ] {
        write(text);
        refused(&b, &path, want);
        let error = TextSet::read(&path, &b, 0).unwrap_err().to_string();
        assert!(!error.contains("secret") && error.contains("texts.jsonl"), "{error}");
    }
    write(&format!("{good}{{\"text\": \"a\", \"label\": \"c\"}}"));
    refused(&b, &path, "the label `c` has one text");
    std::fs::write(&path, b"\xff").unwrap();
    refused(&b, &path, "not UTF-8");
    let plain = dir.path().join("texts.csv");
    std::fs::write(&plain, "a,b").unwrap();
    refused(&b, &plain, "neither a directory");
}

#[test]
fn the_next_token_is_the_label() {
    let (b, dir) = (backbone(4), tempfile::tempdir().unwrap());
    let path = dir.path().join("book.txt");
    let book = "The ship was on the sea and the boat was in the water. ".repeat(40);
    std::fs::write(&path, &book).unwrap();
    let read = |labels: Vocabulary<'_>| TextSet::next_token(&path, &b, labels, 0);
    let set = read(Vocabulary::Most(6)).unwrap();
    assert_eq!(set.labels.len(), 6);
    assert!(set.labels.contains(&"Ġthe".to_owned()), "{:?}", set.labels);
    let ids = b.encode(&book).unwrap();
    for e in set.train.iter().chain(&set.test) {
        // What follows this window somewhere in the book.
        let label = &set.labels[e.label];
        assert!(ids.windows(5).any(|w| w[..4] == e.ids && b.piece(w[4]) == *label), "{label}");
    }
    assert!(set.train.len() > 3 * set.test.len() && !set.test.is_empty());
    let labels: Vec<String> = set.labels.iter().rev().cloned().collect();
    let known = read(Vocabulary::Known(&labels)).unwrap();
    assert_eq!((known.train.len(), known.test.len()), (set.train.len(), set.test.len()));
    assert!(known.train.iter().zip(&set.train).all(|(a, b)| a.ids == b.ids && a.label == 5 - b.label));

    let fails = |labels: Vocabulary<'_>, want: &str| {
        let error = read(labels).unwrap_err().to_string();
        assert!(error.contains(want), "{want}: {error}");
    };
    fails(Vocabulary::Most(1), "--vocabulary 1");
    fails(Vocabulary::Known(&["x".into(), "y".into()]), "like that which it was trained on");
    for (text, want) in [
        (b"  ".to_vec(), "is empty"),
        (b"The \xff".to_vec(), "not UTF-8 from byte 4"),
        (b"The ship was on the sea.".to_vec(), "longer text or a smaller --window"),
        (b" sea".repeat(100), "fewer than two tokens"),
    ] {
        std::fs::write(&path, text).unwrap();
        fails(Vocabulary::Most(8), want);
    }
}

#[test]
fn made_from_a_seed() {
    let b = backbone(16);
    let set = TextSet::synthetic(&b, 10, 3).unwrap();
    assert_eq!((set.train.len(), set.test.len(), set.labels.len()), (32, 8, 4));
    assert_eq!(set, TextSet::synthetic(&b, 10, 3).unwrap());
    for n in 0..4 {
        assert_eq!(set.test.iter().filter(|e| e.label == n).count(), 2);
    }
    assert!(TextSet::synthetic(&b, 4, 3).unwrap_err().to_string().contains("5 to 2000"));
    let (windows, from) = samples(None, &b, 32).unwrap();
    assert!(windows.len() == 32 && windows.iter().all(|w| w.len() == 16) && from.contains("32 windows"), "{from}");
    // Some short ones with begin tokens before them, some from running text.
    assert!(windows.iter().any(|w| w[0] == 0) && windows.iter().any(|w| w[0] != 0));
}
