//! The README's three hosts, by a script that a reader can follow.

use std::path::Path;
use std::process::Command;

#[test]
fn the_readme_s_three_hosts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Command::new("bash")
        .arg(root.join("tests/three_hosts.sh"))
        .arg(env!("CARGO_BIN_EXE_trefoil"))
        .arg(root.join("models/quill-4m"))
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    println!("{said}");
    assert!(out.status.success(), "{said}\n{wrong}");
    assert!(said.contains("the same tokens as in one process"), "{said}");
    // The README and the script give the same commands.
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let script = std::fs::read_to_string(root.join("tests/three_hosts.sh")).unwrap();
    for command in [
        "init owner --name",
        "init helper --name",
        "init client --name",
        "prepare --model",
        "party --config",
        "doctor --config",
        "generate --config",
    ] {
        assert!(script.contains(&format!(" {command}")), "{command}");
        assert!(readme.contains(&format!("trefoil {command}")), "{command}");
    }
}
