#![no_main]

#[path = "../targets/api.rs"]
#[expect(dead_code, reason = "one of several targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::pod(input));
