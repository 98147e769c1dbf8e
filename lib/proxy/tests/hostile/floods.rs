//! Floods, a row each: what is sent, and whether the proxy ends the connection. Memory stays bounded in any case.

use std::{net::SocketAddr, time::Duration};

use libtest_mimic::Failed;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};

use crate::{
    Outcome, block_on,
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PRIORITY, RST_STREAM, SETTINGS, UNKNOWN,
        begin, frame, get, head, post, stream, window_update,
    },
    honest::Honest,
    process::{FOR_EVER, Proxy, STALL, endpoint},
};

/// Connections at once, if the row says nothing else.
const AT_ONCE: u32 = 4;
/// Writes of one connection, if it is not ended before.
const WRITES: u32 = 20_000;
/// What a flood may cost, KiB.
const COST: u64 = 32 << 10;
/// Connections of honest clients.
const OTHERS: usize = 2;
/// A flood that is neither through nor cut off by then is stuck: no measure of speed.
const PATIENCE: Duration = Duration::from_secs(60);
const WINDOW: u32 = 65_535;
const MOST: u32 = 0x7fff_ffff;

pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Sent first.
    first: fn() -> Vec<u8>,
    /// Sent then, by number.
    next: fn(u32) -> Vec<u8>,
    writes: u32,
    /// Connections at once: the bound of what is not taken holds for each.
    at_once: u32,
    /// Whether the client takes what comes back.
    reads: bool,
    /// Whether the proxy must end the connection.
    ends: bool,
}

const fn row(name: &'static str, next: fn(u32) -> Vec<u8>, ends: bool) -> Row {
    Row { name, first: || begin(WINDOW), next, writes: WRITES, at_once: AT_ONCE, reads: true, ends }
}

pub(crate) static ROWS: &[Row] = &[
    row("rapid_reset", |n| [get(n, "/wait"), reset(n)].concat(), true),
    row("rapid_reset_of_uploads", |n| [post(n, "/wait"), reset(n)].concat(), true),
    // The client has the proxy reset its streams (CVE-2025-8671).
    row("made_you_reset_by_an_empty_window_update", |n| [get(n, "/wait"), window_update(stream(n), 0)].concat(), true),
    row("made_you_reset_by_a_window_too_large", |n| [get(n, "/wait"), window_update(stream(n), MOST)].concat(), true),
    row("made_you_reset_by_data_after_the_end", |n| [get(n, "/wait"), data(n, b"x")].concat(), true),
    row("made_you_reset_by_a_wrong_length", |n| [too_long(n), data(n, b"x")].concat(), true),
    row("continuation_without_end", |n| if n == 0 { opened(b"") } else { more(&field().repeat(100)) }, true),
    row("continuation_of_nothing", |n| if n == 0 { opened(b"") } else { more(b"").repeat(50) }, true),
    row("settings", |_| frame(SETTINGS, 0, 0, &[]).repeat(10), false),
    Row { reads: false, ..row("settings_unread", |_| frame(SETTINGS, 0, 0, &[]).repeat(1000), true) },
    row("ping", |_| frame(PING, 0, 0, &[0; 8]).repeat(10), false),
    Row { reads: false, ..row("ping_unread", |_| frame(PING, 0, 0, &[0; 8]).repeat(1000), true) },
    row("priority", |n| frame(PRIORITY, 0, stream(n), &[0, 0, 0, 0, 9]), false),
    row("window_updates", |_| window_update(0, 1).repeat(10), false),
    row("unknown_frames", |_| frame(UNKNOWN, 0xff, 0, &[0; 512]), false),
    row("goaway", |_| frame(GOAWAY, 0, 0, &[0; 8]), true),
    // Nobody reads these, and they need no window.
    Row { writes: 4000, ..row("empty_data", |n| if n == 0 { full_post() } else { data(0, b"").repeat(500) }, true) },
    row("streams_without_end", |n| post(n, "/wait"), true),
    // One entry of the table, 4 KB, named 8,000 times in each head.
    Row { writes: 2000, ..row("hpack_bomb", bomb, true) },
    Row { first: || begin(0), writes: 200, at_once: 1, ..row("no_window", |n| get(n, "/big"), true) },
    Row {
        first: || [begin(MOST), window_update(0, MOST - WINDOW)].concat(),
        writes: 200,
        at_once: 1,
        reads: false,
        ..row("all_the_window_and_nothing_read", |n| get(n, "/big"), true)
    },
    Row {
        first: Vec::new,
        reads: false,
        ..row("pipelined_and_unread", |_| b"GET /page HTTP/1.1\r\nHost: h\r\n\r\n".repeat(10), true)
    },
    Row {
        first: || b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
        ..row("chunk_extensions", |_| format!("1;{}\r\nx\r\n", "e".repeat(500)).into_bytes(), true)
    },
    Row {
        first: || b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n".to_vec(),
        ..row("trailers_without_end", |n| format!("t{n}: {}\r\n", "v".repeat(500)).into_bytes(), true)
    },
    Row {
        first: || b"GET / HTTP/1.1\r\nHost: h\r\n".to_vec(),
        ..row("fields_without_end", |n| format!("f{n}: {}\r\n", "v".repeat(500)).into_bytes(), true)
    },
];

fn reset(number: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream(number), &8_u32.to_be_bytes())
}

fn data(number: u32, bytes: &[u8]) -> Vec<u8> {
    frame(DATA, 0, stream(number), bytes)
}

/// A head that goes on.
fn opened(rest: &[u8]) -> Vec<u8> {
    frame(HEADERS, END_STREAM, stream(0), &[&head("GET", "/"), rest].concat())
}

fn more(fields: &[u8]) -> Vec<u8> {
    frame(CONTINUATION, 0, stream(0), fields)
}

fn field() -> Vec<u8> {
    vec![0x00, 0x01, b'x', 0x01, b'y']
}

/// An upload that says it is empty.
fn too_long(number: u32) -> Vec<u8> {
    // content-length (28 of the static table): 0.
    let block = [head("POST", "/wait"), vec![0x0f, 0x0d, 1, b'0']].concat();
    frame(HEADERS, END_HEADERS, stream(number), &block)
}

/// An upload that the endpoint does not read, as long as the window allows.
fn full_post() -> Vec<u8> {
    [post(0, "/wait"), data(0, &[b'x'; 16_384]).repeat(3)].concat()
}

fn bomb(number: u32) -> Vec<u8> {
    let mut block = head("GET", "/");
    if number == 0 {
        // With incremental indexing, a new name.
        block.extend_from_slice(&[0x40, 1, b'b', 0x7f, 0x81, 0x1e]);
        block.extend(std::iter::repeat_n(b'v', 127 + 1 + 30 * 128));
    }
    // 62: the youngest entry.
    block.extend(std::iter::repeat_n(0x80 | 62, 8000));
    frame(HEADERS, END_STREAM | END_HEADERS, stream(number), &block)
}

pub(crate) fn run(row: &'static Row) -> Outcome {
    block_on(async {
        let proxy = Proxy::start(endpoint().await?, 1000, STALL)?;
        let mut honest = Honest::start(proxy.addr);
        honest.answered(20).await?;
        proxy.forget_peak()?;
        let before = proxy.memory()?;
        let floods: Vec<_> = (0..row.at_once).map(|_| tokio::spawn(flood(proxy.addr, row))).collect();
        honest.answered(20).await?;
        if row.reads {
            for flood in floods {
                let ended = flood.await??;
                if ended != row.ends {
                    return Err(format!("the proxy ended the connection: {ended}").into());
                }
            }
            proxy.lets_go_but(OTHERS).await?;
        } else {
            // These hold on to their connections, so it is the proxy that lets go.
            proxy.lets_go_but(OTHERS).await?;
            floods.iter().for_each(JoinHandle::abort);
        }
        honest.answered(20).await?;
        let cost = proxy.peak()?.saturating_sub(before);
        honest.end().await?;
        eprintln!("{}: {cost} KiB", row.name);
        if cost > COST { Err(format!("{cost} KiB more than the {before} KiB before").into()) } else { Ok(()) }
    })
}

/// Sends a row; true if the proxy ended the connection.
async fn flood(proxy: SocketAddr, row: &Row) -> Result<bool, Failed> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.write_all(&(row.first)()).await?;
    let (mut from, mut to) = stream.split();
    let writing = async {
        for number in 0..row.writes {
            if to.write_all(&(row.next)(number)).await.is_err() {
                return true;
            }
        }
        if row.ends {
            // All is sent: the end is the proxy's.
            std::future::pending::<()>().await;
        }
        false
    };
    if !row.reads {
        return Ok(writing.await);
    }
    let reading = async {
        let mut buffer = vec![0; 65_536];
        while from.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        true
    };
    let both = async {
        tokio::select! {
            cut = writing => cut,
            cut = reading => cut,
        }
    };
    timeout(PATIENCE, both).await.map_err(|_late| "neither through nor ended".into())
}

/// What one client does not take of an endpoint's answers is no reason for another one not to get its own: both have streams
/// on the same connection to the endpoint.
pub(crate) fn stalled_streams_starve_nobody() -> Outcome {
    block_on(async {
        let proxy = Proxy::start(endpoint().await?, 1000, FOR_EVER)?;
        let mut stalled = TcpStream::connect(proxy.addr).await?;
        stalled.write_all(&begin(WINDOW)).await?;
        for number in 0..90 {
            stalled.write_all(&get(number, "/big")).await?;
        }
        let mut honest = Honest::start(proxy.addr);
        honest.answered(100).await?;
        honest.end().await?;
        drop(stalled);
        Ok(())
    })
}
