//! Counters of connections against what was really sent, on loopback.

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use lifl_ebpf::{Connections, Traffic, side};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

type Outcome<T = ()> = Result<T, Failed>;
type Case = fn() -> Outcome;

const PATIENCE: Duration = Duration::from_secs(30);
const PLACE: u64 = 1 << 40;
const ACCEPTED: usize = side::ACCEPTED as usize;
const DIALLED: usize = side::DIALLED as usize;
/// Makes this binary the process that [`nothing_is_left_behind`] kills.
const CHILD: &str = "--load-and-wait";

/// Tests by the names of their functions.
macro_rules! trials {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), $name as Case)),*] };
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some(CHILD) {
        return child().expect("child");
    }
    let refusal = Traffic::load().err().map(|error| error.to_string());
    let cases = trials![
        bytes_of_both_ends_are_those_that_were_sent,
        whoever_closes_first_not_a_byte_differs,
        a_connection_that_stands_is_counted_when_asked_and_not_twice,
        a_dial_in_vain_is_counted_as_that,
        sockets_without_mark_and_places_that_are_closed_are_not_counted,
        a_successor_adopts_what_was_counted_and_what_stands,
        a_listener_can_be_marked_anew,
        nothing_runs_while_nobody_opens_or_closes,
        nothing_is_left_behind,
    ];
    let trials = cases.into_iter().map(|(name, case)| {
        let why = refusal.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        Trial::test(format!("{name}{why}"), case).with_ignored_flag(refusal.is_some())
    });
    // The program is one for the machine: who asks whether it runs must be alone.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// A marked listener on loopback.
fn listener(traffic: &Traffic) -> Outcome<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    traffic.open(PLACE)?;
    traffic.mark(listener.as_fd(), PLACE, side::ACCEPTED)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn unconnected(traffic: &Traffic) -> Outcome<OwnedFd> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    traffic.mark(socket.as_fd(), PLACE, side::DIALLED)?;
    Ok(socket)
}

/// Waits until the counters are as wanted: the kernel ends a connection when the last packet has come.
fn until(traffic: &Traffic, what: &str, wanted: impl Fn(&Connections) -> bool) -> Outcome<Connections> {
    let begun = Instant::now();
    loop {
        let now = traffic.connections(PLACE)?;
        if wanted(&now) {
            return Ok(now);
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("waited for {what}: {now:?}").into());
        }
        std::thread::yield_now();
    }
}

fn closed(side: usize, count: u64) -> impl Fn(&Connections) -> bool {
    move |now| now.closed[side] == count
}

/// Sends so many bytes each way and closes, the client first or not.
fn exchange(mut client: TcpStream, listener: &TcpListener, up: usize, down: usize, client_first: bool) -> Outcome {
    let (mut server, _) = listener.accept()?;
    let serving = std::thread::spawn(move || -> io::Result<()> {
        let mut heard = vec![0; up];
        server.read_exact(&mut heard)?;
        server.write_all(&vec![7; down])?;
        if client_first {
            server.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    });
    client.write_all(&vec![3; up])?;
    let mut heard = vec![0; down];
    client.read_exact(&mut heard)?;
    if !client_first {
        client.read_to_end(&mut Vec::new())?;
    }
    drop(client);
    Ok(serving.join().map_err(|_panic| "the server panicked")??)
}

fn bytes_of_both_ends_are_those_that_were_sent() -> Outcome {
    let traffic = Traffic::load()?;
    let (listener, address) = listener(&traffic)?;
    let mut sums = (0, 0);
    for (count, (up, down)) in
        [(0, 0), (1, 0), (0, 1), (1000, 70_000), (20_000_000, 1), (3, 9_000_000)].into_iter().enumerate()
    {
        let socket = unconnected(&traffic)?;
        connect(&socket, &address)?;
        exchange(TcpStream::from(socket), &listener, up, down, true)?;
        sums = (sums.0 + up as u64, sums.1 + down as u64);
        let count = count as u64 + 1;
        let now = until(&traffic, "the ends", |now| now.closed == [count; 2])?;
        assert_eq!(now.opened, [count; 2]);
        assert_eq!((now.received[ACCEPTED], now.sent[ACCEPTED]), sums, "after {up} up, {down} down");
        assert_eq!((now.sent[DIALLED], now.received[DIALLED]), sums, "after {up} up, {down} down");
    }
    assert_eq!(traffic.connections(PLACE)?.failed, 0);
    Ok(())
}

fn whoever_closes_first_not_a_byte_differs() -> Outcome {
    let traffic = Traffic::load()?;
    let (listener, address) = listener(&traffic)?;
    exchange(TcpStream::connect(address)?, &listener, 10, 20, true)?;
    exchange(TcpStream::connect(address)?, &listener, 100, 200, false)?;
    // Half closed, and on it goes in the other direction.
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    client.write_all(&[1; 1000])?;
    client.shutdown(Shutdown::Write)?;
    server.read_to_end(&mut Vec::new())?;
    server.write_all(&[1; 2000])?;
    traffic.settle()?;
    server.write_all(&[1; 3])?;
    drop(server);
    client.read_to_end(&mut Vec::new())?;
    drop(client);
    // Cut off: what has come has come.
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    client.write_all(&[1; 10_000])?;
    server.read_exact(&mut [0; 10_000])?;
    sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
    drop(client);
    let now = until(&traffic, "the ends", closed(ACCEPTED, 4))?;
    assert_eq!((now.received[ACCEPTED], now.sent[ACCEPTED]), (11_110, 2_223));
    assert_eq!((now.opened, now.closed), ([4, 0], [4, 0]));
    drop(server);
    assert_eq!(traffic.connections(PLACE)?, now);
    Ok(())
}

fn a_connection_that_stands_is_counted_when_asked_and_not_twice() -> Outcome {
    let traffic = Traffic::load()?;
    let (listener, address) = listener(&traffic)?;
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    client.write_all(&[1; 5000])?;
    server.read_exact(&mut [0; 5000])?;
    server.write_all(&[1; 700])?;
    client.read_exact(&mut [0; 700])?;
    let before = traffic.connections(PLACE)?;
    assert_eq!((before.opened[ACCEPTED], before.closed[ACCEPTED], before.received[ACCEPTED]), (1, 0, 0));
    for _ in 0..3 {
        traffic.settle()?;
        let now = traffic.connections(PLACE)?;
        assert_eq!(now.received[ACCEPTED], 4999, "the last byte may be a FIN, for all it knows");
        assert!(now.sent[ACCEPTED] <= 700, "{now:?}");
    }
    // The client has answered with the acknowledgement of all 700 by then.
    client.write_all(&[1; 10])?;
    server.read_exact(&mut [0; 10])?;
    traffic.settle()?;
    let now = traffic.connections(PLACE)?;
    assert_eq!((now.received[ACCEPTED], now.sent[ACCEPTED]), (5009, 698));
    drop((client, server));
    let now = until(&traffic, "the end", closed(ACCEPTED, 1))?;
    assert_eq!((now.received[ACCEPTED], now.sent[ACCEPTED]), (5010, 700));
    traffic.settle()?;
    assert_eq!(traffic.connections(PLACE)?, now);
    Ok(())
}

fn a_dial_in_vain_is_counted_as_that() -> Outcome {
    let traffic = Traffic::load()?;
    let (listener, address) = listener(&traffic)?;
    drop(listener);
    let socket = unconnected(&traffic)?;
    assert!(connect(&socket, &address).is_err());
    let now = traffic.connections(PLACE)?;
    assert_eq!(now, Connections { failed: 1, ..Connections::default() });
    // The same socket may try again, and is a connection then.
    let listener = TcpListener::bind(address)?;
    connect(&socket, &address)?;
    drop((socket, listener.accept()?));
    until(&traffic, "the end", |now| (now.opened, now.closed, now.failed) == ([0, 1], [0, 1], 1)).map(drop)
}

fn sockets_without_mark_and_places_that_are_closed_are_not_counted() -> Outcome {
    let traffic = Traffic::load()?;
    let (marked, _) = listener(&traffic)?;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    exchange(TcpStream::connect(other.local_addr()?)?, &other, 10, 10, true)?;
    assert_eq!(traffic.connections(PLACE)?, Connections::default());
    // Closed while a connection stands: its end is nobody's.
    let client = TcpStream::connect(marked.local_addr()?)?;
    let _server = marked.accept()?;
    traffic.close(PLACE);
    traffic.settle()?;
    drop(client);
    assert!(traffic.connections(PLACE).is_err());
    traffic.close(PLACE);
    exchange(TcpStream::connect(marked.local_addr()?)?, &marked, 10, 10, true)?;
    traffic.open(PLACE)?;
    assert_eq!(traffic.connections(PLACE)?, Connections::default());
    Ok(())
}

fn a_successor_adopts_what_was_counted_and_what_stands() -> Outcome {
    let traffic = Traffic::load()?;
    let (listener, address) = listener(&traffic)?;
    exchange(TcpStream::connect(address)?, &listener, 10, 20, true)?;
    until(&traffic, "the end", closed(ACCEPTED, 1))?;
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    let kept: Vec<(String, OwnedFd)> = traffic.fds()?.into_iter().map(|(name, fd)| (name.to_owned(), fd)).collect();
    drop(traffic);
    // Nobody has it now but who keeps the descriptors.
    client.write_all(&[1; 300])?;
    server.read_exact(&mut [0; 300])?;
    drop((client, server));
    exchange(TcpStream::connect(address)?, &listener, 1, 2, true)?;
    let traffic = Traffic::adopt(kept)?;
    traffic.open(PLACE)?;
    let now = until(&traffic, "the ends", closed(ACCEPTED, 3))?;
    assert_eq!((now.opened[ACCEPTED], now.received[ACCEPTED], now.sent[ACCEPTED]), (3, 311, 22));
    exchange(TcpStream::connect(address)?, &listener, 5, 5, true)?;
    let now = until(&traffic, "another end", closed(ACCEPTED, 4))?;
    assert_eq!((now.received[ACCEPTED], now.sent[ACCEPTED]), (316, 27));
    traffic.settle()?;
    assert!(traffic.program_runs().is_ok());
    traffic.open(PLACE + 1)?;
    traffic.keep(&BTreeSet::from([PLACE]))?;
    assert_eq!((traffic.connections(PLACE)?, traffic.connections(PLACE + 1).is_err()), (now, true));

    assert!(Traffic::adopt([]).is_err());
    let null = || Ok::<_, io::Error>(OwnedFd::from(std::fs::File::open("/dev/null")?));
    let wrong =
        traffic.fds()?.into_iter().map(|(name, _)| Ok((name.to_owned(), null()?))).collect::<io::Result<Vec<_>>>()?;
    assert!(Traffic::adopt(wrong).is_err());
    Ok(())
}

/// A listener outlives the agent that marked it, when another keeps it: the next agent counts in maps of its own.
fn a_listener_can_be_marked_anew() -> Outcome {
    let first = Traffic::load()?;
    let (listener, address) = listener(&first)?;
    drop(first);
    let second = Traffic::load()?;
    second.open(PLACE)?;
    second.mark(listener.as_fd(), PLACE, side::ACCEPTED)?;
    exchange(TcpStream::connect(address)?, &listener, 10, 20, true)?;
    let now = until(&second, "the end", closed(ACCEPTED, 1))?;
    assert_eq!((now.received[ACCEPTED], now.sent[ACCEPTED]), (10, 20));
    Ok(())
}

/// Counts runs of the program (kernel.bpf_stats_enabled) and prints what one costs.
fn nothing_runs_while_nobody_opens_or_closes() -> Outcome {
    const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
    let before = std::fs::read_to_string(SWITCH)?;
    std::fs::write(SWITCH, "1")?;
    let counted = (|| -> Outcome {
        let traffic = Traffic::load()?;
        let others = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let cost = |what: &str, listener: &TcpListener| -> Outcome {
            let before = traffic.program_runs()?;
            for _ in 0..200 {
                exchange(TcpStream::connect(listener.local_addr()?)?, listener, 1, 1, true)?;
            }
            let after = traffic.program_runs()?;
            let (runs, ns) = (after.count - before.count, after.ns - before.ns);
            eprintln!("{what}: {runs} runs for 200 connections of two ends, {} ns each", ns / runs.max(1));
            assert!(runs >= 200 * 4, "{before:?}, {after:?}");
            Ok(())
        };
        cost("not marked", &others)?;
        let (listener, address) = listener(&traffic)?;
        cost("one end marked", &listener)?;
        let mut client = TcpStream::connect(address)?;
        let (mut server, _) = listener.accept()?;
        // Of the machine's other connections some may open or close just now: a quiet moment is enough.
        for attempt in 0.. {
            let before = traffic.program_runs()?;
            for _ in 0..1000 {
                client.write_all(&[1; 100])?;
                server.read_exact(&mut [0; 100])?;
            }
            if traffic.program_runs()?.count == before.count {
                return Ok(());
            }
            assert!(attempt < 1000, "it runs as bytes pass");
        }
        Ok(())
    })();
    std::fs::write(SWITCH, before)?;
    counted
}

/// Numbers of the programs that a process has descriptors of, or of links to them.
fn programs_of(pid: u32) -> Outcome<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    for fd in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        let text = std::fs::read_to_string(fd.path()).unwrap_or_default();
        numbers.extend(text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u32>().ok()));
    }
    Ok(numbers)
}

fn child() -> Outcome {
    let traffic = Traffic::load()?;
    let (_listener, address) = listener(&traffic)?;
    writeln!(io::stdout(), "{address}")?;
    std::thread::park();
    Ok(())
}

fn nothing_is_left_behind() -> Outcome {
    let mut child = Command::new(std::env::current_exe()?).arg(CHILD).stdout(Stdio::piped()).spawn()?;
    let mut line = [0; 10];
    child.stdout.as_mut().ok_or("no output")?.read_exact(&mut line)?;
    let its = programs_of(child.id());
    child.kill()?;
    child.wait()?;
    let its = its?;
    assert_eq!(its.len(), 2, "{its:?}");
    let loaded = || aya::programs::loaded_programs().flatten().filter(|one| its.contains(&one.id())).count();
    // The kernel frees a program a moment after its last user.
    let begun = Instant::now();
    while loaded() > 0 {
        assert!(begun.elapsed() < PATIENCE, "{its:?} are left");
        std::thread::yield_now();
    }
    Ok(())
}
