//! Every instruction set of this processor against sums in `f64` and integers.
#![expect(
    clippy::cast_possible_truncation,
    clippy::float_cmp,
    reason = "limits and halves are exact in f32, and exactness is what is tested"
)]

use half::{bf16, f16};
use proptest::prelude::*;

use crate::{
    Dtype, FIXED_LIMIT, FixedInput, Input, Kernel, Overflow, as_f32, as_f32_mut, as_i64, as_i64_mut, kernel::QUAD,
};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// An update as it lies in a slot: somewhere, not aligned.
#[derive(Clone, Debug)]
struct Update {
    memory: Vec<u8>,
    skew: usize,
    dtype: Dtype,
}

impl Update {
    fn new(values: &[f32], dtype: Dtype, skew: usize) -> Self {
        let mut memory = vec![0xff; skew];
        for x in values {
            match dtype {
                Dtype::F32 => memory.extend(x.to_le_bytes()),
                Dtype::F16 => memory.extend(f16::from_f32(*x).to_le_bytes()),
                Dtype::Bf16 => memory.extend(bf16::from_f32(*x).to_le_bytes()),
            }
        }
        Self { memory, skew, dtype }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.skew..]
    }

    fn input(&self, factor: f32) -> Input<'_> {
        Input { bytes: self.bytes(), dtype: self.dtype, factor }
    }

    fn fixed(&self, weight: f64) -> FixedInput<'_> {
        FixedInput::Float { bytes: self.bytes(), dtype: self.dtype, weight }
    }

    fn values(&self) -> Vec<f64> {
        values(self.bytes(), self.dtype)
    }
}

fn values(bytes: &[u8], dtype: Dtype) -> Vec<f64> {
    bytes
        .chunks(dtype.size())
        .map(|x| match dtype {
            Dtype::F32 => f64::from(f32::from_le_bytes(x.try_into().unwrap())),
            Dtype::F16 => f64::from(f16::from_le_bytes(x.try_into().unwrap())),
            Dtype::Bf16 => f64::from(bf16::from_le_bytes(x.try_into().unwrap())),
        })
        .collect()
}

/// Lengths around the quad, where the loops change hands.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![0..4 * QUAD, 16_000..18_000_usize]
}

fn updates() -> impl Strategy<Value = (Vec<f32>, Vec<(Update, f32)>)> {
    lengths().prop_flat_map(|n| {
        let numbers = prop::collection::vec(-100.0_f32..100.0, n);
        let update = (numbers.clone(), prop::sample::select(&DTYPES[..]), 0..9_usize, -10.0_f32..10.0);
        let update = update.prop_map(|(x, dtype, skew, factor)| (Update::new(&x, dtype, skew), factor));
        (numbers, prop::collection::vec(update, 0..14))
    })
}

/// The sums in `f64`, and the sums of magnitudes that rounding errors are measured by.
fn oracle(base: Option<&[f32]>, n: usize, inputs: &[(Update, f32)]) -> Vec<(f64, f64)> {
    let mut sums: Vec<_> = (0..n).map(|i| base.map_or(0.0, |base| f64::from(base[i]))).map(|x| (x, x.abs())).collect();
    for (update, factor) in inputs {
        for (sum, x) in sums.iter_mut().zip(update.values()) {
            let product = x * f64::from(*factor);
            *sum = (sum.0 + product, sum.1 + product.abs());
        }
    }
    sums
}

fn assert_near(kernel: Kernel, out: &[f32], oracle: &[(f64, f64)], inputs: usize) {
    assert_eq!(out.len(), oracle.len());
    let roundings = f64::from(u32::try_from(2 * inputs).unwrap());
    for (i, (out, (sum, magnitude))) in out.iter().zip(oracle).enumerate() {
        let bound = roundings * f64::from(f32::EPSILON) * magnitude;
        assert!((f64::from(*out) - sum).abs() <= bound, "{} at {i}: {out} instead of {sum}", kernel.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_match_f64((base, inputs) in updates(), lead in 0..5_usize) {
        let n = base.len();
        let borrowed: Vec<_> = inputs.iter().map(|(update, factor)| update.input(*factor)).collect();
        for kernel in Kernel::all() {
            let mut memory = vec![f32::NAN; lead + n];
            let out = &mut memory[lead..];
            kernel.fold_f32(out, None, &borrowed);
            assert_near(kernel, out, &oracle(None, n, &inputs), inputs.len());
            kernel.fold_f32(out, Some(&base), &borrowed);
            assert_near(kernel, out, &oracle(Some(&base), n, &inputs), inputs.len());
            let folded = out.to_vec();
            prop_assert_eq!(kernel.fold_finite_f32(out, Some(&base), &borrowed), Ok(()));
            prop_assert_eq!(&folded[..], &*out, "checked and unchecked must agree to the bit");
            out.copy_from_slice(&base);
            kernel.add_f32(out, &borrowed);
            prop_assert_eq!(&folded[..], &*out, "in place and apart must agree to the bit");
        }
    }

    #[test]
    fn fixed_sums_are_the_same_bits_everywhere((base, inputs) in updates(), split in 0..14_usize, power in 0..30_i32) {
        let (n, scale) = (base.len(), 2.0_f64.powi(power));
        let base: Vec<i64> = base.iter().map(|x| i64::from(x.to_bits()) - (1 << 30)).collect();
        let fixed: Vec<_> = inputs.iter().map(|(update, weight)| update.fixed(f64::from(*weight))).collect();
        let mut expected = base.clone();
        for (update, weight) in &inputs {
            for (sum, x) in expected.iter_mut().zip(update.values()) {
                let product = (x * (f64::from(*weight) * scale)).round_ties_even();
                *sum += format!("{product:.0}").parse::<i64>().unwrap();
            }
        }
        for kernel in Kernel::all() {
            let mut out = vec![-1; n];
            kernel.fold_i64(&mut out, Some(&base), &fixed, scale).unwrap();
            prop_assert_eq!(&out, &expected, "{}", kernel.name());

            let backwards: Vec<_> = fixed.iter().rev().copied().collect();
            kernel.fold_i64(&mut out, Some(&base), &backwards, scale).unwrap();
            prop_assert_eq!(&out, &expected, "{} backwards", kernel.name());

            let (left, right) = fixed.split_at(split.min(fixed.len()));
            let mut partials = [vec![0; n], vec![0; n]];
            kernel.fold_i64(&mut partials[0], None, left, scale).unwrap();
            kernel.fold_i64(&mut partials[1], None, right, scale).unwrap();
            let tree = [FixedInput::Partial(&partials[1]), FixedInput::Partial(&base), FixedInput::Partial(&partials[0])];
            kernel.fold_i64(&mut out, None, &tree, scale).unwrap();
            prop_assert_eq!(&out, &expected, "{} as a tree", kernel.name());

            let out_again: Vec<_> = inputs.iter().map(|(update, weight)| update.fixed(-f64::from(*weight))).collect();
            let mut rest = vec![0; n];
            kernel.fold_i64(&mut rest, Some(&expected), &out_again, scale).unwrap();
            prop_assert_eq!(&rest, &base, "{} taken out again", kernel.name());
        }
    }

    #[test]
    fn models_are_base_plus_mean((sums, inputs) in updates(), to in prop::sample::select(&DTYPES[..]), weight in 1.0_f64..1000.0, skew in 0..5_usize) {
        let n = sums.len();
        let base = inputs.first().map(|(update, _)| update);
        let fixed: Vec<i64> = sums.iter().map(|x| i64::from(x.to_bits()) * 1_000_003).collect();
        let scale = 1024.0;
        let mut bits: Option<Vec<u8>> = None;
        for kernel in Kernel::all() {
            let mut memory = vec![0; skew + n * to.size()];
            let out = &mut memory[skew..];
            kernel.scale_f32(out, to, &sums, 1.0 / weight, base.map(|base| (base.bytes(), base.dtype)));
            let means = sums.iter().map(|sum| f64::from(*sum) / weight);
            assert_model(out, to, means, base);

            kernel.scale_i64(out, to, &fixed, scale, weight, base.map(|base| (base.bytes(), base.dtype)));
            let means = fixed.iter().map(|sum| *sum as f64 / (scale * weight));
            assert_model(out, to, means, base);
            let first = bits.get_or_insert_with(|| out.to_vec());
            prop_assert_eq!(&first[..], &*out, "{}", kernel.name());
        }
    }

    #[test]
    fn any_bytes_are_copied_or_refused(memory in prop::collection::vec(any::<u8>(), 0..40_000), skew in 0..4_usize, dtype in prop::sample::select(&DTYPES[..])) {
        let src = memory.get(skew..).unwrap_or(&[]);
        let src = &src[..src.len() / dtype.size() * dtype.size()];
        let expected = values(src, dtype).iter().position(|x| !x.is_finite());
        for kernel in Kernel::all() {
            prop_assert_eq!(kernel.first_non_finite(src, dtype), expected, "{}", kernel.name());
            let mut dst = vec![0; src.len()];
            prop_assert_eq!(kernel.copy_finite(&mut dst, src, dtype).err(), expected, "{}", kernel.name());
            let copied = expected.map_or(src.len(), |i| i * dtype.size() / 8192 * 8192);
            prop_assert_eq!(&dst[..copied], &src[..copied]);
        }
    }
}

fn assert_model(out: &[u8], to: Dtype, means: impl Iterator<Item = f64>, base: Option<&Update>) {
    let base = base.map(Update::values);
    for (i, (out, mean)) in values(out, to).into_iter().zip(means).enumerate() {
        let exact = mean + base.as_ref().map_or(0.0, |base| base[i]);
        // Half a unit in the last place, and a little for the reciprocal and the step through `f32`.
        let (half, smallest, largest) = match to {
            Dtype::F32 => (2.0_f64.powi(-24), 0.0, f64::from(f32::MAX)),
            Dtype::F16 => (2.0_f64.powi(-11), 2.0_f64.powi(-25), 65504.0),
            Dtype::Bf16 => (2.0_f64.powi(-8), 0.0, f64::from(f32::MAX)),
        };
        if exact.abs() <= largest {
            assert!(
                (out - exact).abs() <= exact.abs() * half * 1.001 + smallest * 1.001,
                "at {i}: {out} instead of {exact}"
            );
        }
    }
}

#[test]
fn every_half_widens_exactly() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let expected = values(&bytes, dtype);
        for kernel in Kernel::all() {
            let mut out = vec![0.0; expected.len()];
            kernel.fold_f32(&mut out, None, &[Input { bytes: &bytes, dtype, factor: 1.0 }]);
            for (out, expected) in out.iter().zip(&expected) {
                assert!(
                    f64::from(*out) == *expected || out.is_nan() && expected.is_nan(),
                    "{}: {out} instead of {expected}",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn every_half_comes_back_from_a_model() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let wide: Vec<f32> = values(&bytes, dtype).iter().map(|x| *x as f32).collect();
        for kernel in Kernel::all() {
            let mut out = vec![0; bytes.len()];
            kernel.scale_f32(&mut out, dtype, &wide, 1.0, None);
            for (i, (out, x)) in values(&out, dtype).iter().zip(&wide).enumerate() {
                assert!(
                    *out == f64::from(*x) || out.is_nan() && x.is_nan(),
                    "{} {dtype:?} {i:#x}: {out} instead of {x}",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn a_large_sum_goes_past_the_caches_and_stays_right() {
    let n = (4 << 20) / 4 + 77;
    let values: Vec<f32> = (0..n).map(|i| (i % 1009) as f32).collect();
    let updates: Vec<_> = DTYPES.map(|dtype| (Update::new(&values, dtype, 1), 0.5)).to_vec();
    for kernel in Kernel::all() {
        for k in 0..=updates.len() {
            let inputs: Vec<_> = updates[..k].iter().map(|(update, factor)| update.input(*factor)).collect();
            let mut memory = vec![f32::NAN; n + 3];
            kernel.fold_f32(&mut memory[3..], Some(&values), &inputs);
            assert_near(kernel, &memory[3..], &oracle(Some(&values), n, &updates[..k]), k);
        }
    }
}

#[test]
fn large_fixed_sums_and_models_go_past_the_caches_and_stay_right() {
    let n = (4 << 20) / 2 + 77;
    let values: Vec<f32> = (0..n).map(|i| (i % 1009) as f32).collect();
    let updates = DTYPES.map(|dtype| Update::new(&values, dtype, 1));
    let inputs: Vec<_> = updates.iter().map(|update| update.fixed(3.0)).collect();
    let base: Vec<i64> = (0..n as i64).collect();
    let mut expected = base.clone();
    for update in &updates {
        expected.iter_mut().zip(update.values()).for_each(|(sum, x)| *sum += (x * 12.0) as i64);
    }
    for kernel in Kernel::all() {
        let mut memory = vec![-1; n + 3];
        assert_eq!(kernel.fold_i64(&mut memory[3..], Some(&base), &inputs, 4.0), Ok(()));
        assert!(memory[3..] == expected, "{}", kernel.name());
        for dtype in DTYPES {
            for skew in [0, 1, 36] {
                let mut model = vec![0; skew + n * dtype.size()];
                kernel.scale_i64(
                    &mut model[skew..],
                    dtype,
                    &expected,
                    1024.0,
                    9.0,
                    Some((updates[0].bytes(), Dtype::F32)),
                );
                let means = expected.iter().map(|sum| *sum as f64 / 9216.0);
                assert_model(&model[skew..], dtype, means, Some(&updates[0]));
            }
        }
    }
}

#[test]
fn one_bad_element_is_found_wherever_it_stands() {
    let good = Update::new(&[1.0; 9000], Dtype::F16, 0);
    let mut sums = [0.0; 9000];
    for dtype in DTYPES {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in (0..300).chain([2047, 2048, 4095, 4096, 8999]) {
                let mut values = vec![65504.0; 9000];
                values[at] = bad;
                let update = Update::new(&values, dtype, 1);
                for kernel in Kernel::all() {
                    let inputs = [good.input(1.0), update.input(0.0), good.input(1.0)];
                    assert_eq!(kernel.fold_finite_f32(&mut sums, None, &inputs), Err(at));
                    assert_eq!(
                        kernel.first_non_finite(update.bytes(), dtype),
                        Some(at),
                        "{} {dtype:?} {bad}",
                        kernel.name()
                    );
                    let mut dst = vec![0; update.bytes().len()];
                    assert_eq!(kernel.copy_finite(&mut dst, update.bytes(), dtype), Err(at));
                }
            }
        }
    }
}

#[test]
fn a_copy_past_the_caches_is_whole_at_any_alignment() {
    let values: Vec<f32> = (0..20_000).map(|i| i as f32).collect();
    let update = Update::new(&values, Dtype::F32, 3);
    for kernel in Kernel::all() {
        for skew in 0..70 {
            let mut memory = vec![0; skew + update.bytes().len()];
            assert_eq!(kernel.copy_finite(&mut memory[skew..], update.bytes(), Dtype::F32), Ok(()));
            assert!(memory[skew..] == *update.bytes(), "{} at {skew}", kernel.name());
        }
    }
}

#[test]
fn an_overflow_is_found_wherever_it_stands() {
    let n = 2 * QUAD + 9;
    for at in 0..n {
        for kernel in Kernel::all() {
            let mut out = vec![0; n];
            let mut fold =
                |base: Option<&[i64]>, inputs: &[FixedInput<'_>]| kernel.fold_i64(&mut out, base, inputs, 1.0);
            for bad in [2.0 * FIXED_LIMIT as f32, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -2.0 * FIXED_LIMIT as f32]
            {
                let mut values = vec![1.0; n];
                values[at] = bad;
                assert_eq!(
                    fold(None, &[Update::new(&values, Dtype::F32, 0).fixed(1.0)]),
                    Err(Overflow),
                    "{} {bad}",
                    kernel.name()
                );
            }
            let mut values = vec![1.0; n];
            values[at] = FIXED_LIMIT as f32;
            let update = Update::new(&values, Dtype::F32, 0);
            let mut base = vec![0; n];
            assert_eq!(fold(Some(&base), &[update.fixed(1.0)]), Ok(()), "the limit itself is allowed");
            base[at] = i64::MAX - (1 << 51) + 1;
            assert_eq!(fold(Some(&base), &[update.fixed(1.0)]), Err(Overflow));
            assert_eq!(fold(None, &[FixedInput::Partial(&base), update.fixed(1.0)]), Err(Overflow));
            assert_eq!(fold(Some(&base), &[FixedInput::Partial(&base)]), Err(Overflow));
            base[at] = i64::MIN + (1 << 51) - 1;
            assert_eq!(fold(Some(&base), &[update.fixed(-1.0)]), Err(Overflow));
            base[at] += 1;
            assert_eq!(fold(Some(&base), &[update.fixed(-1.0)]), Ok(()));
        }
    }
}

#[test]
fn ties_go_to_even() {
    let update = Update::new(&[0.5, 1.5, 2.5, -0.5, -1.5, -2.5], Dtype::F32, 0);
    for kernel in Kernel::all() {
        let mut out = [9; 6];
        assert_eq!(kernel.fold_i64(&mut out, None, &[update.fixed(1.0)], 1.0), Ok(()));
        assert_eq!(out, [0, 2, 2, 0, -2, -2]);
    }
}

#[test]
fn views_refuse_what_is_not_whole() {
    let mut memory = [0_i64; 4];
    memory[1] = 1;
    let bytes: Vec<u8> = memory.iter().flat_map(|x| x.to_le_bytes()).collect();
    let lead = bytes.as_ptr().align_offset(8);
    assert!(as_f32(&bytes[lead..lead + 7]).is_none());
    assert!(as_i64(&bytes[lead..lead + 12]).is_none());
    assert!(as_f32(&bytes[lead + 1..lead + 5]).is_none());
    assert_eq!(as_i64(&bytes[lead..lead + 16]).map(<[i64]>::len), Some(2));
    let mut copy = bytes.clone();
    let lead = copy.as_ptr().align_offset(8);
    as_i64_mut(&mut copy[lead..lead + 8]).unwrap()[0] = -1;
    as_f32_mut(&mut copy[lead + 8..lead + 12]).unwrap()[0] = 1.0;
    assert_eq!(copy[lead..lead + 8], [0xff; 8]);
    assert_eq!(copy[lead + 8..lead + 12], 1.0_f32.to_le_bytes());
}

#[test]
fn dtypes_have_their_numbers() {
    for dtype in DTYPES {
        assert_eq!(Dtype::from_u32(dtype as u32), Some(dtype));
    }
    assert_eq!(Dtype::from_u32(0), None);
    assert_eq!(Dtype::from_u32(4), None);
}

#[test]
#[should_panic(expected = "an input has another length than the sum")]
fn a_short_input_is_refused() {
    Kernel::best().fold_f32(&mut [0.0; 3], None, &[Input { bytes: &[0; 8], dtype: Dtype::F32, factor: 1.0 }]);
}
