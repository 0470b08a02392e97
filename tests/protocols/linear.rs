//! Owner linear maps and the private embedding.

use ndarray::Array2;
use proptest::prelude::*;
use trefoil::party::Role;
use trefoil::prf::PreparationSeed;
use trefoil::protocol::embedding::{self, TableShare, embed};
use trefoil::protocol::linear::{self, OwnerMatrix, owner_linear};
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{Given, Random, assert_cost, run};

/// A matrix of integers with `f` fraction bits and each party's part of it.
struct Matrix {
    w: Vec<i64>,
    parts: [OwnerMatrix; 3],
}

impl Matrix {
    /// Integers of `bits` bits, which an f32 represents exactly up to 24.
    fn new(r: &mut Random, outputs: usize, inputs: usize, bits: u32, f: u32, bias: Option<&[f32]>) -> Matrix {
        let w: Vec<i64> = r.signed(outputs * inputs, bits, 64).into_iter().map(|v| v as i64).collect();
        let scale = 2f32.powi(f as i32);
        let floats = Array2::from_shape_vec((outputs, inputs), w.iter().map(|&v| v as f32 / scale).collect()).unwrap();
        let seed = PreparationSeed::from_bytes([r.word() as u8; 32]);
        let owner = OwnerMatrix::quantise(3, "w", floats.view(), bias, f).unwrap();
        // As narrow as they fit: some of 24 bits may happen to fit 16.
        let fit = |fits: fn(i64) -> bool| w.iter().all(|&v| fits(v));
        let width = if fit(|v| i8::try_from(v).is_ok()) {
            1
        } else if fit(|v| i16::try_from(v).is_ok()) {
            2
        } else {
            4
        };
        assert_eq!(owner.bytes(), outputs * inputs * width);
        let helper = OwnerMatrix::helper(3, outputs, inputs, f, owner.helper_words(&seed).unwrap()).unwrap();
        let client = OwnerMatrix::client(3, outputs, inputs, f, seed);
        Matrix { w, parts: [owner, client, helper] }
    }

    fn of(&self, role: Role) -> &OwnerMatrix {
        &self.parts[role.index()]
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn owner_linear_is_exact(
        seed: u64, outputs in 1usize..150, inputs in 1usize..700, k in 1u32..=64, bits in prop::sample::select(&[8u32, 16, 24][..]), with_bias: bool,
        groups in 1usize..3,
    ) {
        let (mut r, passes) = (Random(seed), [2, 1, 4]);
        let bias: Vec<f32> = (0..outputs).map(|i| i as f32 - 40.5).collect();
        let m = Matrix::new(&mut r, outputs, inputs, bits, 6, with_bias.then_some(&bias));
        let x = r.words(7 * groups * inputs, k);
        let given = Given::even(&x, &passes, k, 4);
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![owner_linear(s, &Scope::layer(1).at("w"), &x, m.of(s.role()))?])
        });
        prop_assert_eq!((ran.k[0], ran.f[0]), (k, 10));
        let want: Vec<u64> = x
            .chunks(inputs)
            .flat_map(|x| {
                m.w.chunks(inputs).zip(&bias).map(move |(w, b)| {
                    let b = if with_bias { (b * 1024.0) as i64 as u64 } else { 0 };
                    let y = w.iter().zip(x).fold(b, |y, (w, x)| y.wrapping_add((*w as u64).wrapping_mul(*x)));
                    y & ring::mask(k)
                })
            })
            .collect();
        prop_assert_eq!(ran.only(), want);
    }

    #[test]
    fn a_diagonal_scales_every_element(seed: u64, width in 1usize..300, k in 1u32..=64, bits in prop::sample::select(&[8u32, 16, 24][..])) {
        let (mut r, passes) = (Random(seed), [2, 1, 4]);
        let m = Matrix::new(&mut r, 1, width, bits, 6, None);
        let parts = m.parts.clone().map(|p| p.into_diagonal().unwrap());
        let x = r.words(7 * width, k);
        let given = Given::even(&x, &passes, k, 4);
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![owner_linear(s, &Scope::layer(1).at("w"), &x, &parts[s.role().index()])?])
        });
        let want: Vec<u64> =
            x.iter().zip(m.w.iter().cycle()).map(|(x, w)| x.wrapping_mul(*w as u64) & ring::mask(k)).collect();
        prop_assert_eq!(ran.only(), want);
    }

    #[test]
    fn embedding_gives_the_row(seed: u64, vocabulary in 1usize..1300, width in 1usize..70, k in 1u32..=64) {
        let (mut r, passes) = (Random(seed), [3, 1, 2]);
        let table = r.words(vocabulary * width, 64);
        let shares = table_shares(&table, vocabulary, width);
        let mut ids: Vec<u64> = (0..6).map(|_| r.below(vocabulary) as u64).collect();
        ids[5] = vocabulary as u64 - 1;
        let given = Given::even(&ids, &passes, 64, 0);
        let ran = run(&passes, |s| {
            let share = &shares[s.role().index()];
            let tokens = s.tokens();
            let source = given.source(s);
            Ok(vec![embed(s, &Scope::new("embed"), share, tokens, k, source)?])
        });
        prop_assert_eq!((ran.k[0], ran.f[0]), (k, 12));
        let want: Vec<u64> = ids
            .iter()
            .flat_map(|&t| table[t as usize * width..][..width].iter().map(|v| v & ring::mask(k)))
            .collect();
        prop_assert_eq!(ran.only(), want);
    }
}

fn table_shares(table: &[u64], vocabulary: usize, width: usize) -> [TableShare; 3] {
    let seed = PreparationSeed::from_bytes([7; 32]);
    let mut a = vec![0; table.len()];
    seed.matrix_words(11, 0, &mut a);
    a.iter_mut().zip(table).for_each(|(a, e)| *a = e.wrapping_sub(*a));
    let rows = || TableShare::rows((vocabulary, width), 12, a.clone()).unwrap();
    [rows(), TableShare::seed((vocabulary, width), 12, 11, seed), rows()]
}

#[test]
fn costs() {
    let mut r = Random(8);
    let m = Matrix::new(&mut r, 65, 33, 16, 6, None);
    let given = Given::even(&r.words(33, 52), &[1], 52, 4);
    let ran = run(&[1], |s| {
        let x = given.share(s, "x")?;
        Ok(vec![owner_linear(s, &Scope::new("w"), &x, m.of(s.role()))?])
    });
    assert_cost("owner linear, 65 outputs of 52 bits", &ran, &[&given], linear::cost(65, 52));

    let shares = table_shares(&r.words(37 * 5, 64), 37, 5);
    let given = Given::even(&[36, 0, 8], &[3], 64, 0);
    let ran = run(&[3], |s| {
        let source = given.source(s);
        Ok(vec![embed(s, &Scope::new("embed"), &shares[s.role().index()], 3, 49, source)?])
    });
    assert_cost("embedding of 3 tokens, 37 rows of 5 elements, 49 bits", &ran, &[], embedding::cost(3, 37, 5, 49));
}
