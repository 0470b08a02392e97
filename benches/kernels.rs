//! The kernels that do nearly all local work, on every instruction set that this machine has: matrix products in
//! multiply-adds per second, folds in lookups per second, packing and PRF streams in bytes per second.
//! One thread: `RAYON_NUM_THREADS=1 cargo bench --bench kernels`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use std::hint::black_box;
use std::time::Duration;
use trefoil::model::matmul_transposed;
use trefoil::prf::PreparationSeed;
use trefoil::ring::{Isa, fold, gemm, mask, pack};

fn words(n: usize) -> Vec<u64> {
    (0..n as u64).map(|i| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}

fn gemms(c: &mut Criterion) {
    for (t, m, n) in [(1, 2048, 2048), (16, 512, 2048), (128, 512, 2048), (512, 2048, 2048)] {
        let mut group = c.benchmark_group(format!("gemm/{t}x{m}x{n}"));
        group.throughput(Throughput::Elements((t * m * n) as u64));
        let (x, w) = (words(t * n), words(m * n));
        let w32: Vec<i32> = w.iter().map(|&v| (v >> 40) as i32).collect();
        let w16: Vec<i16> = w.iter().map(|&v| (v >> 40) as i16).collect();
        let w8: Vec<i8> = w16.iter().map(|&v| v as i8).collect();
        let mut out = vec![0; t * m];
        for isa in Isa::available() {
            group.bench_function(BenchmarkId::new("ring", isa.name()), |b| {
                b.iter(|| gemm::multiply(isa, black_box(&x), &w, t, m, n, &mut out));
            });
            for k in [44, 52] {
                group.bench_function(BenchmarkId::new(format!("ring{k}"), isa.name()), |b| {
                    let part = |from: usize, words: &mut [u64]| words.copy_from_slice(&w[from..][..words.len()]);
                    b.iter(|| gemm::Rows::on(isa, k, black_box(&x), n).times(m, part, &mut out));
                });
            }
            group.bench_function(BenchmarkId::new("i32", isa.name()), |b| {
                b.iter(|| gemm::multiply(isa, black_box(&x), &w32, t, m, n, &mut out));
            });
            group.bench_function(BenchmarkId::new("i16", isa.name()), |b| {
                b.iter(|| gemm::multiply_i16(isa, 44, black_box(&x), &w16, (t, m, n), &mut out));
            });
            group.bench_function(BenchmarkId::new("i8", isa.name()), |b| {
                b.iter(|| gemm::multiply_i8(isa, 44, black_box(&x), &w8, (t, m, n), &mut out));
            });
        }
        group.finish();
    }
}

/// One row by a matrix larger than the caches, as in decode: bytes per second beside a plain read of as many, and
/// multiply-adds of 8-bit weights beside f32's.
fn gemv(c: &mut Criterion) {
    let (m, n, k) = (8192, 4096, 44);
    let x = words(n);
    let w16: Vec<i16> = words(m * n).iter().map(|&v| (v >> 40) as i16).collect();
    let w8: Vec<i8> = w16.iter().map(|&v| v as i8).collect();
    let mut out = vec![0; m];
    let mut group = c.benchmark_group(format!("gemv/{m}x{n}"));
    let of = |bytes: usize| Throughput::ElementsAndBytes { elements: (m * n) as u64, bytes: (bytes * m * n) as u64 };
    group.throughput(of(2));
    let plain: Vec<u64> = words(m * n / 4);
    group.bench_function("plain_read_of_i16", |b| {
        b.iter(|| black_box(&plain).iter().fold(0, |a, &v| a ^ v));
    });
    group.bench_function("i16", |b| b.iter(|| gemm::weights_i16(k, black_box(&x), &w16, 1, m, n, &mut out)));
    group.throughput(of(1));
    group.bench_function("i8", |b| b.iter(|| gemm::weights_i8(k, black_box(&x), &w8, 1, m, n, &mut out)));
    group.throughput(of(4));
    let (f, row) = (Array2::<f32>::ones((m, n)), Array2::<f32>::ones((1, n)));
    group.bench_function("f32", |b| b.iter(|| matmul_transposed(black_box(row.view()), f.view())));
    group.finish();
}

fn folds(c: &mut Criterion) {
    for (elements, n, width) in [(1024, 256, 1), (1024, 512, 2), (4096, 16, 1), (4, 65536, 2)] {
        let mut group = c.benchmark_group(format!("fold/{n}rows_{width}words"));
        group.throughput(Throughput::Elements(elements as u64));
        let tables = vec![words(2 * n); width];
        let tables: Vec<&[u64]> = tables.iter().map(Vec::as_slice).collect();
        let offset: Vec<u32> = words(elements).iter().map(|v| (v % n as u64) as u32).collect();
        let queries = pack::pack(&words(elements * n / 64), 64);
        let mut out = vec![0; elements * width];
        // Of 32 bits.
        let narrow = vec![words(2 * n).iter().map(|v| *v as u32).collect::<Vec<_>>(); width];
        let narrow: Vec<&[u32]> = narrow.iter().map(Vec::as_slice).collect();
        let mut narrow_out = vec![0; elements * width];
        for isa in Isa::available() {
            group.bench_function(isa.name(), |b| {
                b.iter(|| fold::sums_on(isa, &tables, n, &offset, black_box(&queries), &mut out));
            });
            group.bench_function(BenchmarkId::new(isa.name(), 32), |b| {
                b.iter(|| fold::sums_on(isa, &narrow, n, &offset, black_box(&queries), &mut narrow_out));
            });
        }
        group.finish();
    }
}

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("pack");
    let n = 1 << 14;
    for k in [1, 8, 18, 40, 43, 52, 64] {
        let values: Vec<u64> = words(n).iter().map(|v| v & mask(k)).collect();
        let packed = pack::pack(&values, k);
        let mut out = Vec::with_capacity(packed.len());
        group.throughput(Throughput::ElementsAndBytes { elements: n as u64, bytes: packed.len() as u64 });
        group.bench_function(BenchmarkId::new("pack", k), |b| {
            b.iter(|| {
                out.clear();
                pack::pack_into(black_box(&values), k, &mut out);
            });
        });
        group.bench_function(BenchmarkId::new("unpack", k), |b| b.iter(|| pack::unpack(black_box(&packed), n, k)));
    }
    group.finish();
}

fn keystream(c: &mut Criterion) {
    let mut group = c.benchmark_group("prf");
    let mut words = vec![0; 1 << 13];
    group.throughput(Throughput::Bytes(8 * words.len() as u64));
    let stream = PreparationSeed::from_bytes([7; 32]).matrix(1);
    group.bench_function("aes128_ctr", |b| b.iter(|| stream.words(0, black_box(&mut words))));
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300));
    targets = gemms, gemv, folds, packing, keystream
}
criterion_main!(kernels);
