//! The breaker against a model of it: a row of numbers.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Waker},
};

use proptest::prelude::*;

use super::*;

type Waiting = Pin<Box<dyn Future<Output = Result<Permit, Full>> + Send>>;

#[derive(Clone, Debug)]
enum Step {
    /// A request comes.
    Come,
    /// The n-th of those worked on ends.
    End(usize),
    /// The n-th of those waiting goes away.
    GoAway(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Come),
        2 => any::<usize>().prop_map(Step::End),
        1 => any::<usize>().prop_map(Step::GoAway),
    ];
    proptest::collection::vec(step, 0..200)
}

fn poll(future: &mut Waiting) -> Option<Result<Permit, Full>> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        std::task::Poll::Ready(result) => Some(result),
        std::task::Poll::Pending => None,
    }
}

proptest! {
    #[test]
    fn places_go_in_turn_and_none_is_lost(concurrency in 1_usize..4, line in 0_usize..6, steps in steps()) {
        let breaker = Breaker::new(concurrency, line);
        let mut working: VecDeque<(usize, Permit)> = VecDeque::new();
        let mut waiting: VecDeque<(usize, Waiting)> = VecDeque::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Come => {
                    let room = working.len() + waiting.len() < concurrency + line;
                    let shared = breaker.clone();
                    let mut future: Waiting = Box::pin(async move { shared.acquire().await });
                    match poll(&mut future) {
                        Some(Ok(permit)) => {
                            prop_assert!(working.len() < concurrency && waiting.is_empty(), "a place was free");
                            working.push_back((number, permit));
                        }
                        Some(Err(Full)) => prop_assert!(!room, "refused although there was room"),
                        None => {
                            prop_assert!(room && working.len() == concurrency, "must wait only if all is taken");
                            waiting.push_back((number, future));
                        }
                    }
                }
                Step::End(which) if !working.is_empty() => {
                    drop(working.remove(which % working.len()));
                    // The first in line, and nobody else, has the place now.
                    if let Some((first, mut future)) = waiting.pop_front() {
                        let permit = poll(&mut future).expect("the first in line is next").expect("a place");
                        working.push_back((first, permit));
                    }
                    for (_, future) in &mut waiting {
                        prop_assert!(poll(future).is_none(), "only the first in line is next");
                    }
                }
                Step::GoAway(which) if !waiting.is_empty() => {
                    drop(waiting.remove(which % waiting.len()));
                }
                Step::End(_) | Step::GoAway(_) => {}
            }
            prop_assert_eq!(breaker.present(), working.len() + waiting.len());
        }
    }
}

#[test]
fn nought_is_no_limit() {
    assert!(Breaker::for_concurrency(0).is_none());
    let breaker = Breaker::for_concurrency(3).expect("a limit");
    assert_eq!((breaker.shared.concurrency, breaker.shared.line), (3, 30));
    assert_eq!(Full.to_string(), "pending request queue full");
}

/// All threads at once, places changing hands while others go away: at no time more than the limit, and in the end none
/// is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_threads_never_exceed_the_limit() {
    let breaker = Breaker::new(3, 10_000);
    let inside = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..400)
        .map(|number| {
            let (breaker, inside) = (breaker.clone(), Arc::clone(&inside));
            tokio::spawn(async move {
                for turn in 0..20 {
                    if (number + turn) % 7 == 0 {
                        // Goes away after one look.
                        let mut future: Waiting = Box::pin({
                            let breaker = breaker.clone();
                            async move { breaker.acquire().await }
                        });
                        drop(poll(&mut future));
                        continue;
                    }
                    let permit = breaker.acquire().await.expect("room");
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < 3, "more than the limit");
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!((breaker.present(), breaker.shared.lock().wakers.len()), (0, 0));
}
