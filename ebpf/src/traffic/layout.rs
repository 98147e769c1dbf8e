//! Where fields of the running kernel's structs are: its own description of its types (BTF), read.
//!
//! What C compilers do for programs of C (CO-RE) the one for Rust does not. Little is needed of it: a struct by name, a field by
//! name, within nameless members too.

use std::{collections::HashMap, io};

const MAGIC: u16 = 0xeb9f;

/// The kinds of types that are followed.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const ENUM64: u32 = 19;
}

/// A description of types.
pub(super) struct Types<'a> {
    strings: &'a [u8],
    /// By number, where each begins; 0 is `void`.
    types: Vec<&'a [u8]>,
}

// === impl Types ===

impl<'a> Types<'a> {
    /// Reads the file `/sys/kernel/btf/vmlinux`.
    pub(super) fn read(bytes: &'a [u8]) -> io::Result<Self> {
        Self::parse(bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "types of the kernel: not understood"))
    }

    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let magic = u16::from_le_bytes(bytes.first_chunk().copied()?);
        let body = bytes.get(word(bytes, 4)? as usize..)?;
        let section = |at: usize| {
            let (from, length) = (word(bytes, at)? as usize, word(bytes, at + 4)? as usize);
            body.get(from..from.checked_add(length)?)
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        let mut types: Vec<&[u8]> = vec![&[]];
        while !rest.is_empty() {
            let info = word(rest, 4)?;
            let more = match kind_of(info) {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * members(info),
                kind::ENUM | kind::FUNC_PROTO => 8 * members(info),
                _ => 0,
            };
            let (one, next) = rest.split_at_checked(12 + more)?;
            types.push(one);
            rest = next;
        }
        (magic == MAGIC).then_some(Self { strings, types })
    }

    /// Offsets in bytes of these fields of a struct; a dot leads into a member that has a name.
    pub(super) fn offsets<const N: usize>(&self, of: &str, fields: [&str; N]) -> io::Result<[u32; N]> {
        let missing = |what: &str| io::Error::new(io::ErrorKind::NotFound, format!("the kernel has no {what}"));
        let is = |one: &&&[u8]| {
            word(one, 4).is_some_and(|info| kind_of(info) == kind::STRUCT && members(info) > 0)
                && word(one, 0).and_then(|name| self.string(name)) == Some(of.as_bytes())
        };
        let found = self.types.iter().find(is).ok_or_else(|| missing(&format!("struct {of}")))?;
        let mut known = HashMap::new();
        self.fields("", found, 0, &fields, &mut known);
        let mut out = [0; N];
        for (slot, field) in out.iter_mut().zip(fields) {
            *slot = known.get(field).copied().ok_or_else(|| missing(&format!("field {field} in struct {of}")))?;
        }
        Ok(out)
    }

    /// Notes where the wanted fields are in this struct or union, which itself is at `base` under the name `prefix`.
    fn fields(&self, prefix: &str, of: &[u8], base: u32, wanted: &[&str], out: &mut HashMap<String, u32>) {
        let info = word(of, 4).unwrap_or_default();
        for at in 0..members(info) {
            let at = 12 + 12 * at;
            let (Some(name), Some(number), Some(bits)) = (word(of, at), word(of, at + 4), word(of, at + 8)) else {
                return;
            };
            // Where bit fields are described, the upper byte is the size of one.
            let (bits, is_bits) = if info >> 31 == 1 { (bits & 0x00ff_ffff, bits >> 24 != 0) } else { (bits, false) };
            let Some(name) = self.string(name).and_then(|name| std::str::from_utf8(name).ok()) else { return };
            let name = if name.is_empty() { prefix.to_owned() } else { format!("{prefix}{name}") };
            let offset = base + bits / 8;
            if wanted.contains(&name.as_str()) && bits % 8 == 0 && !is_bits {
                out.insert(name.clone(), offset);
            }
            let inside = if name == prefix { name } else { format!("{name}.") };
            let leads_on = inside == prefix || wanted.iter().any(|wanted| wanted.starts_with(&inside));
            if let Some(one) = self.composite(number).filter(|_| leads_on) {
                self.fields(&inside, one, offset, wanted, out);
            }
        }
    }

    /// The struct or union behind names and qualifiers.
    fn composite(&self, mut number: u32) -> Option<&'a [u8]> {
        loop {
            let one = *self.types.get(number as usize)?;
            match kind_of(word(one, 4)?) {
                kind::STRUCT | kind::UNION => return Some(one),
                // TYPEDEF, VOLATILE, CONST, RESTRICT: to an earlier or a later one, but never in a circle without a pointer.
                kind::TYPEDEF..=kind::RESTRICT => number = word(one, 8)?,
                _ => return None,
            }
        }
    }

    fn string(&self, at: u32) -> Option<&'a [u8]> {
        self.strings.get(at as usize..)?.split(|byte| *byte == 0).next()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn kind_of(info: u32) -> u32 {
    info >> 24 & 0x1f
}

fn members(info: u32) -> usize {
    (info & 0xffff) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ```c
    /// struct common { int pad; union { unsigned long flags; }; };
    /// typedef const struct common common_t;
    /// struct tcp { common_t base; int bit : 3; int count; };
    /// ```
    fn description() -> Vec<u8> {
        let strings = b"\0int\0common\0pad\0flags\0common_t\0tcp\0base\0bit\0count\0";
        let name = |of: &str| {
            let at = strings.windows(of.len() + 1).position(|w| w.starts_with(of.as_bytes()) && w.ends_with(&[0]));
            u32::try_from(at.unwrap()).unwrap()
        };
        let info = |kind: u32, members: u32| kind << 24 | members;
        let types: Vec<u32> = [
            vec![name("int"), info(kind::INT, 0), 4, 32],
            vec![0, info(kind::UNION, 1), 8, name("flags"), 1, 0],
            vec![name("common"), info(kind::STRUCT, 2), 16, name("pad"), 1, 0, 0, 2, 64],
            vec![0, info(10, 0), 3],
            vec![name("common_t"), info(kind::TYPEDEF, 0), 4],
            vec![name("tcp"), info(kind::STRUCT, 3) | 1 << 31, 24]
                .into_iter()
                .chain([name("base"), 5, 0, name("bit"), 1, 3 << 24 | 128, name("count"), 1, 160])
                .collect(),
        ]
        .concat();
        let length = u32::try_from(types.len() * 4).unwrap();
        let header = [24, 0, length, length, u32::try_from(strings.len()).unwrap()];
        let words = header.into_iter().chain(types).flat_map(u32::to_le_bytes);
        [0x9f, 0xeb, 1, 0].into_iter().chain(words).chain(strings.iter().copied()).collect()
    }

    #[test]
    fn fields_are_found_through_names_qualifiers_and_nameless_members() {
        let bytes = description();
        let types = Types::read(&bytes).unwrap();
        assert_eq!(types.offsets("tcp", ["base.flags", "count"]).unwrap(), [8, 20]);
        assert_eq!(types.offsets("common", ["pad", "flags"]).unwrap(), [0, 8]);
        assert!(types.offsets("tcp", ["bit"]).unwrap_err().to_string().contains("field bit in struct tcp"));
        assert!(types.offsets("tcp", ["flags"]).is_err(), "it is of another struct");
        assert!(types.offsets("udp", []).unwrap_err().to_string().contains("struct udp"));
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let bytes = description();
        for length in 0..bytes.len() {
            assert!(Types::read(&bytes[..length]).is_err(), "{length}");
        }
        assert!(Types::read(&[0; 64]).is_err());
    }
}
