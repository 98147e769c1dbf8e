use super::*;
use crate::state::Loaded;

fn key(name: &str) -> Key {
    Key { namespace: "default".into(), name: name.into() }
}

fn document(name: &str, rounds: u32) -> FederatedJob {
    let text = format!(
        "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {{name: {name}, namespace: default, uid: {name}-1, \
         generation: 1}}\nspec:\n  model: {{name: m, initial: {{uri: file:///m}}}}\n  rounds: {rounds}\n  \
         clientsPerRound: 4\n  minClients: 2\n  checkpoint: {{uri: file:///c/{name}}}\n"
    );
    FederatedJob::from_yaml(&text).unwrap()
}

fn wish(name: &str, created: u32) -> Wish {
    Wish {
        uid: format!("{name}-1"),
        generation: 1,
        created: format!("2026-01-01T00:00:{created:02}Z"),
        document: Ok(document(name, 3)),
        secret: Secret::None,
        status: None,
    }
}

fn state(wish: &Wish) -> JobState {
    JobState::new("j".into(), wish.document.clone().unwrap(), wish.secret.value(), 0, Loaded::default(), 0)
}

#[derive(Default)]
struct World {
    wishes: BTreeMap<Key, Wish>,
    jobs: Jobs,
    loading: BTreeSet<Key>,
    now: i64,
}

impl World {
    fn wishing(wishes: impl IntoIterator<Item = (&'static str, Wish)>) -> Self {
        let wishes = wishes.into_iter().map(|(name, wish)| (key(name), wish)).collect();
        Self { wishes, ..Self::default() }
    }

    fn holding(wishes: impl IntoIterator<Item = (&'static str, Wish)>) -> Self {
        let mut world = Self::wishing(wishes);
        world.jobs = Jobs::new(world.wishes.values().map(state).collect());
        world
    }

    fn wish(&mut self, name: &str) -> &mut Wish {
        self.wishes.get_mut(&key(name)).unwrap()
    }

    fn steps(&self, at_once: usize) -> Vec<Step> {
        let Self { wishes, jobs, loading, now } = self;
        steps(&Look { wishes, jobs, loading, at_once, now: *now })
    }

    /// The reason and the message of the only refusal.
    fn refusal(&mut self, at_once: usize) -> (Shown, String, String) {
        let steps = self.steps(at_once);
        let [Step::Refuse(key, absent)] = steps.as_slice() else { panic!("{steps:?}") };
        self.jobs.absent.insert(key.clone(), absent.clone());
        assert!(self.steps(at_once).is_empty(), "it is said once");
        let ready = absent.status.conditions.iter().find(|c| c.kind == kind::READY).unwrap();
        assert_eq!((ready.status.as_str(), ready.observed_generation), ("False", Some(absent.generation)));
        (absent.status.phase, ready.reason.clone(), ready.message.clone())
    }
}

#[test]
fn who_came_first_begins_first_and_the_others_wait_for_room() {
    let mut world = World::wishing([("a", wish("a", 3)), ("b", wish("b", 1)), ("c", wish("c", 2))]);
    let steps = world.steps(2);
    assert_eq!(steps[..2], [Step::TakeOn(key("b")), Step::TakeOn(key("c"))]);
    assert!(matches!(&steps[2], Step::Refuse(of, _) if *of == key("a")), "{steps:?}");
    world.loading = [key("b"), key("c")].into();
    let (phase, reason, message) = world.refusal(2);
    assert_eq!((phase, reason.as_str()), (Shown::Pending, "NodeFull"));
    assert!(message.starts_with("2 jobs run already"), "{message}");
    world.loading.remove(&key("b"));
    world.wishes.remove(&key("b"));
    assert_eq!(world.steps(2), [Step::TakeOn(key("a"))]);
    world.jobs = Jobs::new(vec![state(&wish("a", 3))]);
    world.jobs.absent.insert(key("a"), wish("a", 3).waiting("NodeFull", "", 0));
    assert_eq!(world.steps(2), [Step::Forget(key("a"))]);
}

#[test]
fn a_job_that_is_not_wished_ends_and_one_of_its_name_is_another() {
    let mut world = World::holding([("a", wish("a", 1)), ("b", wish("b", 1))]);
    assert!(world.steps(4).is_empty());
    world.wishes.remove(&key("a"));
    assert_eq!(world.steps(4), [Step::End(0)]);
    let mut again = wish("a", 9);
    again.uid = "a-2".into();
    world.wishes.insert(key("a"), again);
    assert_eq!(world.steps(4), [Step::End(0), Step::TakeOn(key("a"))]);
    // Jobs of files are nobody's wish.
    let mut job = document("c", 1);
    job.metadata.uid = None;
    world = World {
        jobs: Jobs::new(vec![JobState::new("c".into(), job, None, 0, Loaded::default(), 0)]),
        ..World::default()
    };
    assert!(world.steps(4).is_empty());
}

#[test]
fn what_cannot_be_run_is_told_why_and_hides_no_other() {
    let invalid =
        Wish { document: Err("spec.minClients: 9 is not within 1..=4 (clientsPerRound)".into()), ..wish("a", 1) };
    let mut world = World::wishing([("a", invalid)]);
    let (phase, reason, message) = world.refusal(4);
    assert_eq!((phase, reason.as_str()), (Shown::Failed, "Invalid"));
    assert!(message.starts_with("spec.minClients: 9"), "{message}");
    world.wishes.insert(key("b"), wish("b", 2));
    assert_eq!(world.steps(1), [Step::TakeOn(key("b"))]);
    world.wishes.remove(&key("b"));
    *world.wish("a") = Wish { generation: 2, ..wish("a", 1) };
    assert_eq!(world.steps(1), [Step::TakeOn(key("a"))]);
    world.wishes.remove(&key("a"));
    assert_eq!(world.steps(1), [Step::Forget(key("a"))]);
}

#[test]
fn a_secret_is_waited_for() {
    let mut world = World::wishing([("a", Wish { secret: Secret::Unknown, ..wish("a", 1) })]);
    assert!(world.steps(4).is_empty());
    world.wish("a").secret = Secret::Missing("Secret default/s is not there".into());
    let (phase, reason, message) = world.refusal(4);
    assert_eq!(
        (phase, reason.as_str(), message.as_str()),
        (Shown::Pending, "SecretMissing", "Secret default/s is not there")
    );
    world.wish("a").secret = Secret::Here("hunter2".into());
    assert_eq!(world.steps(4), [Step::TakeOn(key("a"))]);
}

#[test]
fn a_spec_or_a_secret_that_differs_is_told_to_the_job() {
    let mut world = World::holding([("a", Wish { secret: Secret::Here("old".into()), ..wish("a", 1) })]);
    assert!(world.steps(4).is_empty());
    world.wish("a").secret = Secret::Here("new".into());
    assert_eq!(world.steps(4), [Step::Change(0, key("a"))]);
    world.wish("a").secret = Secret::Missing("away".into());
    assert!(world.steps(4).is_empty(), "what it has it keeps");
    world.wish("a").generation = 2;
    assert_eq!(world.steps(4), [Step::Change(0, key("a"))]);
    // Looked at and not followed: told again, until it is.
    world.jobs.get_mut(0).unwrap().document.status.as_mut().unwrap().observed_generation = 2;
    assert_eq!(world.steps(4), [Step::Change(0, key("a"))]);
    world.wish("a").secret = Secret::Unknown;
    assert!(world.steps(4).is_empty());
}

#[test]
fn a_job_that_is_over_begins_anew_with_another_spec_only() {
    let mut world = World::holding([("a", wish("a", 1))]);
    world.jobs.get_mut(0).unwrap().phase = crate::state::Phase::Succeeded;
    world.wish("a").status = Some(FederatedJobStatus { round: 3, ..FederatedJobStatus::default() });
    assert!(world.steps(4).is_empty());
    world.wish("a").generation = 2;
    assert_eq!(world.steps(4), [Step::End(0), Step::TakeOn(key("a"))]);
}

#[test]
fn what_ended_in_an_earlier_life_is_not_run_again() {
    let over = |phase| FederatedJobStatus { phase, observed_generation: 1, round: 2, ..FederatedJobStatus::default() };
    let mut world = World::wishing([("a", Wish { status: Some(over(Shown::Failed)), ..wish("a", 1) })]);
    let steps = world.steps(4);
    let [Step::Refuse(_, absent)] = steps.as_slice() else { panic!("{steps:?}") };
    assert_eq!((&absent.status, absent.retry_at), (&over(Shown::Failed), None));
    world.wish("a").generation = 2;
    assert_eq!(world.steps(4), [Step::TakeOn(key("a"))], "its spec is another one");
    // One that succeeded is read, to be served; it takes nobody's place, and is not trained if its checkpoint is gone.
    let done = Wish { status: Some(over(Shown::Succeeded)), ..wish("b", 1) };
    assert_eq!(done.lost().unwrap().status, over(Shown::Succeeded));
    assert!(wish("b", 1).lost().is_none());
    let mut world = World::wishing([("b", done), ("c", wish("c", 2))]);
    assert_eq!(world.steps(1), [Step::TakeOn(key("b")), Step::TakeOn(key("c"))]);
    world.loading.clear();
    world.wish("c").created = "2025".into();
    assert_eq!(world.steps(1), [Step::TakeOn(key("c")), Step::TakeOn(key("b"))]);
}

#[test]
fn what_is_not_readable_yet_is_tried_ever_more_rarely() {
    let refusal =
        Refusal { reason: "InitialModelUnreadable", message: "spec.model.initial.uri file:///m: gone".into() };
    let mut world = World::wishing([("a", wish("a", 1))]);
    let mut waits = Vec::new();
    for _ in 0..7 {
        assert_eq!(world.steps(4), [Step::TakeOn(key("a"))]);
        let absent = world.wishes[&key("a")].unreadable(&refusal, world.jobs.absent.get(&key("a")), world.now);
        let at = absent.retry_at.unwrap();
        assert_eq!(absent.status.phase, Shown::Pending);
        assert!(absent.status.conditions[0].message.contains("container"), "{:?}", absent.status.conditions);
        world.jobs.absent.insert(key("a"), absent);
        assert!(world.steps(4).is_empty());
        waits.push(at - world.now);
        world.now = at;
        // While it is read its time is past, and nothing is to be done about that.
        assert_eq!(next_retry(&world.jobs.absent, &world.loading), Some(at));
        assert_eq!(next_retry(&world.jobs.absent, &[key("a")].into()), None);
    }
    assert_eq!(waits, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
    let refusal = Refusal { reason: "Invalid", message: "no".into() };
    let absent = wish("a", 1).unreadable(&refusal, None, 0);
    assert_eq!((absent.status.phase, absent.retry_at), (Shown::Failed, None));
}

#[test]
fn fields_that_others_rest_on_are_fixed() {
    let old = document("a", 3).spec;
    let change = |change: fn(&mut FederatedJobSpec)| {
        let mut new = old.clone();
        change(&mut new);
        fixed(&old, &new)
    };
    assert!(change(|_| ()).is_empty());
    assert!(
        change(|s| {
            (s.rounds, s.min_clients, s.max_weight) = (9, Some(4), 7);
            (s.checkpoint.keep, s.checkpoint.every) = (9, 2);
            s.round_deadline.0 *= 2;
            s.stop = Some(lifl_api::job::StopSpec { metric: "accuracy".into(), at_least: 0.5 });
        })
        .is_empty()
    );
    assert_eq!(change(|s| s.model.name = "n".into()), ["spec.model.name"]);
    assert_eq!(
        change(|s| (s.clients_per_round, s.over_provision) = (5, 2.0)),
        ["spec.clientsPerRound", "spec.overProvision"]
    );
    assert_eq!(change(|s| s.checkpoint.uri = "file:///other".into()), ["spec.checkpoint.uri"]);
    assert_eq!(change(|s| s.ack_level = lifl_api::job::AckLevel::Disk), ["spec.ackLevel"]);
    let mut exact = old.clone();
    exact.aggregation.reproducible = true;
    let mut lighter = exact.clone();
    lighter.max_weight = 7;
    assert_eq!(fixed(&exact, &lighter), ["spec.maxWeight"], "the fixed point rests on it");
}
