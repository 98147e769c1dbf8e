//! The sockets of a member: both ends of a loopback TCP connection (`sk_msg` never runs on Unix sockets).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, accept_with, bind, connect, getpeername, getsockname,
    ipproto, listen, socket_with, sockopt,
};

/// Strangers that may be in the listener's queue before our own connection.
const BACKLOG: i32 = 64;

/// Receive buffer asked for; the kernel doubles it.
///
/// A reader leaves the head of a descriptor in the socket until its rest is there. A segment that is read but for these
/// few bytes still fills the buffer with all its pages, up to 17 of 32 KiB: in a buffer of that size the window stays
/// shut, the rest never comes, and reader and writer wait for each other. The buffer must hold more than that.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Makes a connected pair: end A for the member, end B for the agent.
///
/// The listener is ephemeral and any process of the machine may connect to it first: such a connection is closed, only the
/// one whose addresses are those of our own connecting end counts. Both ends are CLOEXEC and without Nagle's delay.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let listener = tcp()?;
    bind(&listener, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    listen(&listener, BACKLOG)?;
    let door = getsockname(&listener)?;
    let a = tcp()?;
    connect(&a, &door)?;
    let ours = getsockname(&a)?;
    for _ in 0..=BACKLOG {
        let b = accept_with(&listener, SocketFlags::CLOEXEC)?;
        if is_pair(&b, &ours, &door) {
            sockopt::set_tcp_nodelay(&a, true)?;
            sockopt::set_tcp_nodelay(&b, true)?;
            return Ok((a, b));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::ConnectionRefused,
        "strangers crowd the loopback listener of a descriptor socket",
    ))
}

fn tcp() -> io::Result<OwnedFd> {
    let socket = bare_tcp()?;
    // Beyond net.core.rmem_max only with CAP_NET_ADMIN.
    if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
    }
    Ok(socket)
}

fn bare_tcp() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?)
}

fn is_pair(b: &OwnedFd, ours: &SocketAddrAny, door: &SocketAddrAny) -> bool {
    getpeername(b).is_ok_and(|peer| peer.as_ref() == Some(ours)) && getsockname(b).is_ok_and(|local| local == *door)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_are_each_other() {
        let (a, b) = pair().unwrap();
        assert_eq!(getpeername(&a).unwrap(), Some(getsockname(&b).unwrap()));
        rustix::net::send(&a, b"x", rustix::net::SendFlags::NOSIGNAL).unwrap();
        let mut byte = [0];
        assert_eq!(rustix::net::recv(&b, &mut byte, rustix::net::RecvFlags::empty()).unwrap().0, 1);
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn a_stranger_is_not_taken_for_our_end() {
        let listener = tcp().unwrap();
        bind(&listener, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        listen(&listener, BACKLOG).unwrap();
        let door = getsockname(&listener).unwrap();
        let (stranger, a) = (tcp().unwrap(), tcp().unwrap());
        connect(&stranger, &door).unwrap();
        connect(&a, &door).unwrap();
        let ours = getsockname(&a).unwrap();
        let first = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
        let second = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
        assert!(!is_pair(&first, &ours, &door));
        assert!(is_pair(&second, &ours, &door));
    }
}
