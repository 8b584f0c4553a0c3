//! Deliberate bugs, for proving the tests: `PUBSUB_BREAK=name` compiles one of them in, as
//! `cfg(pubsub_break = "name")`. `tests/breaks.py` runs them all.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PUBSUB_BREAK");
    if let Ok(name) = std::env::var("PUBSUB_BREAK")
        && !name.is_empty()
    {
        println!("cargo:rustc-cfg=pubsub_break=\"{name}\"");
        println!("cargo:warning=this build is broken on purpose: {name}");
    }
}
