#![no_std]
#![no_main]

mod object;
mod route;
