//! The descriptor path: loads the sk_msg program, keeps its maps, or routes in user space.
