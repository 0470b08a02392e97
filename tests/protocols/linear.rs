//! Owner linear maps and the private embedding.

use ndarray::Array2;
use proptest::prelude::*;
use trefoil::model::prepare::{Adapters, Projection};
use trefoil::model::secure::projection::projection;
use trefoil::party::Role;
use trefoil::prf::PreparationSeed;
use trefoil::protocol::embedding::{self, TableShare, embed};
use trefoil::protocol::linear::{self, OwnerMatrix, owner_linear, owner_linear_part};
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

    /// Known to all three.
    fn published(self) -> Matrix {
        let owner = self.parts[0].clone().into_public();
        Matrix { parts: [owner.clone(), owner.clone(), owner], ..self }
    }

    fn of(&self, role: Role) -> &OwnerMatrix {
        &self.parts[role.index()]
    }

    /// `W x`, for `x` of as many elements as there are columns.
    fn times(&self, x: &[i64]) -> Vec<i64> {
        self.w.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn owner_linear_is_exact(
        seed: u64, outputs in 1usize..150, inputs in 1usize..700, k in 1u32..=64, bits in prop::sample::select(&[8u32, 16, 24][..]), with_bias: bool,
        groups in 1usize..3, public: bool,
    ) {
        let (mut r, passes) = (Random(seed), [2, 1, 4]);
        let bias: Vec<f32> = (0..outputs).map(|i| i as f32 - 40.5).collect();
        let m = Matrix::new(&mut r, outputs, inputs, bits, 6, with_bias.then_some(&bias));
        let m = if public { m.published() } else { m };
        let x = r.words(7 * groups * inputs, k);
        let given = Given::even(&x, &passes, k, 4);
        let some = outputs / 3..outputs - outputs / 4;
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            let (scope, w) = (Scope::layer(1), m.of(s.role()));
            Ok(vec![owner_linear(s, &scope.at("w"), &x, w)?, owner_linear_part(s, &scope.at("part"), &x, w, some.clone())?])
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
        prop_assert_eq!(&ran.values[0], &want);
        let part: Vec<u64> = want.chunks(outputs).flat_map(|y| &y[some.clone()]).copied().collect();
        prop_assert_eq!(&ran.values[1], &part);
    }

    #[test]
    fn a_diagonal_scales_every_element(seed: u64, width in 1usize..300, k in 1u32..=64, bits in prop::sample::select(&[8u32, 16, 24][..]), public: bool) {
        let (mut r, passes) = (Random(seed), [2, 1, 4]);
        let m = Matrix::new(&mut r, 1, width, bits, 6, None);
        let m = if public { m.published() } else { m };
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

    /// `W x + B (A x)` to within the truncations: a unit for each of the two sums, and one of each middle value through `B`.
    #[test]
    fn a_projection_adds_its_adapters(
        seed: u64, inputs in 1usize..40, outputs in proptest::array::uniform3(1usize..20), adapted in 0u32..8, rank in 1usize..5,
        k in 42u32..=48, f in 12u32..=16, f_a in 12u32..=16, f_b in 12u32..=18, public: bool,
    ) {
        let (mut r, passes) = (Random(seed), [2, 1]);
        let (all, x) = (outputs.iter().sum(), r.signed(3 * inputs, 14, k));
        let bias: Vec<f32> = (0..all).map(|i| i as f32 - 4.5).collect();
        let w = Matrix::new(&mut r, all, inputs, 12, f, Some(&bias));
        let w = if public { w.published() } else { w };
        let which: Vec<usize> = (0..3).filter(|i| adapted >> i & 1 == 1).collect();
        let a = Matrix::new(&mut r, rank * which.len().max(1), inputs, 12, f_a, None);
        let b: Vec<Matrix> = which.iter().map(|&i| Matrix::new(&mut r, outputs[i], rank, 12, f_b, None)).collect();
        let from = |i: usize| outputs[..i].iter().sum::<usize>();
        let parts = Role::ALL.map(|role| {
            let second = |(&i, b): (&usize, &Matrix)| (from(i)..from(i + 1), b.of(role).clone().within(k - f + f_b));
            let adapters = Adapters { a: a.of(role).clone(), b: which.iter().zip(&b).map(second).collect() };
            Projection { base: w.of(role).clone(), adapters: (!which.is_empty()).then_some(adapters) }
        });
        let given = Given::even(&x, &passes, k, 12);
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![projection(s, &Scope::layer(1).at("w"), &x, &parts[s.role().index()])?])
        });
        prop_assert_eq!((ran.k[0], ran.f[0]), (k - f, 12));
        let got = ran.signed(0);
        for (x, got) in x.chunks(inputs).zip(got.chunks(all)) {
            let x: Vec<i64> = x.iter().map(|&v| ring::signed(v, k)).collect();
            let unit = |v: i64, f: u32| v as f64 / f64::from(f).exp2();
            let mut want: Vec<(f64, f64)> =
                w.times(&x).iter().zip(&bias).map(|(v, b)| (unit(*v, f) + f64::from(b * 4096.0), 1.0)).collect();
            let middle: Vec<f64> = a.times(&x).iter().map(|v| unit(*v, f_a)).collect();
            for (nth, (&i, b)) in which.iter().zip(&b).enumerate() {
                let own = &middle[nth * rank..][..rank];
                for (want, row) in want[from(i)..from(i + 1)].iter_mut().zip(b.w.chunks(rank)) {
                    want.0 += row.iter().zip(own).map(|(b, u)| unit(*b, f_b) * u).sum::<f64>();
                    want.1 += 1.0 + row.iter().map(|b| unit(b.abs(), f_b)).sum::<f64>();
                }
            }
            for ((want, slack), got) in want.iter().zip(got) {
                prop_assert!((want - *got as f64).abs() <= slack + 1e-6, "{} instead of {} within {}", got, want, slack);
            }
        }
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
