// What tests run in pods.
//
//	probe serve ADDRESS    answers every request with the host's name and the uid
//	probe get URL          prints the answer
//	probe lookup NAME      prints the addresses, one a line
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if len(os.Args) != 3 {
		fail(fmt.Errorf("serve ADDRESS, get URL or lookup NAME, not %q", os.Args[1:]))
	}
	switch what, on := os.Args[1], os.Args[2]; what {
	case "serve":
		fail(http.ListenAndServe(on, http.HandlerFunc(answer)))
	case "get":
		client := http.Client{Timeout: 10 * time.Second}
		response, err := client.Get(on)
		fail(err)
		body, err := io.ReadAll(response.Body)
		fail(err)
		fmt.Print(string(body))
	case "lookup":
		addresses, err := net.LookupHost(on)
		fail(err)
		for _, address := range addresses {
			fmt.Println(address)
		}
	default:
		fail(fmt.Errorf("what is %q?", what))
	}
}

func answer(w http.ResponseWriter, _ *http.Request) {
	name, err := os.Hostname()
	fail(err)
	fmt.Fprintf(w, "%s as %d\n", name, os.Getuid())
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}
