#![no_main]

#[path = "../targets/proxy.rs"]
#[expect(dead_code, reason = "one of several targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::response(input));
