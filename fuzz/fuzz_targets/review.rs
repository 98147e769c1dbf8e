#![no_main]

#[path = "../targets/webhook.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::review(input));
