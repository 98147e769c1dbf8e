//! Inputs for a target: its seeds, and what becomes of them by small changes. The same ones at each run.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Numbers that look random.
struct Dice(u64);

/// Letters and numbers that parsers stumble over.
const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\0",
    b" ",
    b":",
    b",",
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"-1",
    b"0",
    b"1e400",
    b"\xff\xff\xff\xff",
    b"18446744073709551616",
    b"4294967296",
    b"65536",
    b"\xc3\x28",
    b"%00",
    b"..",
    b"\\u0000",
    b"\xf0\x9f\x8e\x89",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n",
    b"Connection: close, te\r\n",
    b"\x00\x00\x00\x04\x00",
];

// === impl Dice ===

impl Dice {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap_or_default() % below.max(1)
    }
}

/// Runs a target with each seed, and with `rounds` inputs made of them; a panic shows the input that led to it.
pub(crate) fn run(seeds: &[&[u8]], rounds: usize, target: fn(&[u8])) {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for seed in seeds {
        one(seed, target);
    }
    for _ in 0..rounds {
        let mut input = seeds[dice.next(seeds.len())].to_vec();
        for _ in 0..=dice.next(5) {
            change(&mut input, seeds, &mut dice);
        }
        one(&input, target);
    }
}

fn change(input: &mut Vec<u8>, seeds: &[&[u8]], dice: &mut Dice) {
    let at = dice.next(input.len() + 1);
    let to = (at + dice.next(32)).min(input.len());
    match dice.next(8) {
        0 => drop(input.drain(at..to)),
        1 => input.truncate(at),
        2 => {
            let word = WORDS[dice.next(WORDS.len())];
            input.splice(at..at, word.iter().copied());
        }
        3 => {
            let word = WORDS[dice.next(WORDS.len())];
            input.splice(at..to, word.iter().copied());
        }
        4 => {
            let again = input[at..to].to_vec();
            input.splice(at..at, again.repeat(dice.next(9)));
        }
        5 => {
            let other = seeds[dice.next(seeds.len())];
            let from = dice.next(other.len() + 1);
            input.splice(at.., other[from..].iter().copied());
        }
        _ => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << dice.next(8);
            }
        }
    }
}

fn one(input: &[u8], target: fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("the input was: {}", input.escape_ascii());
        resume_unwind(panic);
    }
}
