/*
 * As many UDP datagrams as one processor gets through, in a number of flows, and what they cost it.
 *
 *   pump serve PORT FLOWS
 *   pump send ADDRESS PORT FLOWS RATE SECONDS
 *
 * The server prints "ready" and answers the first datagram of so many flows, so that each is tracked as a connection
 * that both sides have sent in. Then it reads no more, so the rest is dropped at its socket, until its standard input
 * closes. The sender sends one datagram in each flow, waits for the answers to be on their way, and then goes round the
 * flows: at RATE datagrams a second, or without a limit if that is 0. A virtual Ethernet pair carries a datagram to its
 * end in the time of who sends it. At the end the sender prints the datagrams, and the nanoseconds that they took by the
 * clock, and of the processor.
 *
 * The sender writes UDP headers to a raw socket: ten thousand sockets would cost a system call a datagram.
 */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, FIRST_SOURCE = 20000, WARM_RATE = 50000, ROOM = 16 << 20 };

struct datagram {
	struct udphdr udp;
	char content[18];
};

static double seconds_of(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void serve(uint16_t port, int flows)
{
	static char answered[1 << 16];
	const struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	const int room = ROOM, s = socket(AF_INET6, SOCK_DGRAM, 0);
	struct pollfd files[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = s, .events = POLLIN}};
	if (s < 0 || setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) ||
	    bind(s, (const struct sockaddr *)&any, sizeof any))
		err(EXIT_FAILURE, "port %u", port);
	puts("ready");
	fflush(stdout);
	while (poll(files, flows > 0 ? 2 : 1, -1) >= 0 && !files[0].revents) {
		struct sockaddr_in6 from;
		socklen_t length = sizeof from;
		char content[sizeof(struct datagram)];
		if (recvfrom(s, content, sizeof content, 0, (struct sockaddr *)&from, &length) < 0)
			err(EXIT_FAILURE, "recvfrom");
		char *const known = &answered[ntohs(from.sin6_port)];
		if (!*known && sendto(s, content, 1, 0, (struct sockaddr *)&from, length) == 1) {
			*known = 1;
			flows--;
		}
	}
}

static int raw_socket_to(const char *address)
{
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6};
	struct sockaddr_in v4 = {.sin_family = AF_INET};
	const int is_v6 = inet_pton(AF_INET6, address, &v6.sin6_addr) == 1, checksum_at = 6;
	if (!is_v6 && inet_pton(AF_INET, address, &v4.sin_addr) != 1)
		errx(EXIT_FAILURE, "%s is no address", address);
	const int s = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_RAW, IPPROTO_UDP);
	if (s < 0 || (is_v6 && setsockopt(s, IPPROTO_IPV6, IPV6_CHECKSUM, &checksum_at, sizeof checksum_at)) ||
	    connect(s, is_v6 ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4, is_v6 ? sizeof v6 : sizeof v4))
		err(EXIT_FAILURE, "raw socket to %s", address);
	return s;
}

/* Goes round the flows from the first on, for a number of datagrams or of seconds; returns how many were sent. */
static uint64_t send_round(int s, uint16_t port, uint64_t flows, double rate, uint64_t most, double seconds)
{
	struct datagram datagrams[BATCH] = {0};
	struct iovec vectors[BATCH];
	struct mmsghdr messages[BATCH] = {0};
	const double start = seconds_of(CLOCK_MONOTONIC);
	uint64_t sent = 0;

	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){&datagrams[i], sizeof datagrams[i]};
		messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
		datagrams[i].udp = (struct udphdr){.dest = htons(port), .len = htons(sizeof datagrams[i])};
	}
	while (sent < most && seconds_of(CLOCK_MONOTONIC) < start + seconds) {
		const unsigned count = most - sent < BATCH ? (unsigned)(most - sent) : BATCH;
		for (unsigned i = 0; i < count; i++)
			datagrams[i].udp.source = htons((uint16_t)(FIRST_SOURCE + (sent + i) % flows));
		for (unsigned done = 0; done < count;) {
			const int taken = sendmmsg(s, messages + done, count - done, 0);
			/* A raw socket does not wait for room. */
			if (taken < 0 && errno != ENOBUFS)
				err(EXIT_FAILURE, "sendmmsg");
			done += taken < 0 ? 0 : (unsigned)taken;
		}
		sent += count;
		const double ahead = rate > 0 ? start + (double)sent / rate - seconds_of(CLOCK_MONOTONIC) : 0;
		if (ahead > 0)
			nanosleep(&(struct timespec){(time_t)ahead, (long)((ahead - (double)(time_t)ahead) * 1e9)}, NULL);
	}
	return sent;
}

int main(int argc, char **argv)
{
	if (argc == 4 && strcmp(argv[1], "serve") == 0) {
		serve((uint16_t)atoi(argv[2]), atoi(argv[3]));
		return EXIT_SUCCESS;
	}
	if (argc != 7 || strcmp(argv[1], "send"))
		errx(EXIT_FAILURE, "usage: pump serve PORT FLOWS | send ADDRESS PORT FLOWS RATE SECONDS");
	const int s = raw_socket_to(argv[2]);
	const uint16_t port = (uint16_t)atoi(argv[3]);
	const uint64_t flows = strtoull(argv[4], NULL, 10);
	send_round(s, port, flows, WARM_RATE, flows, 60);
	usleep(50000);
	const double wall = seconds_of(CLOCK_MONOTONIC), processor = seconds_of(CLOCK_THREAD_CPUTIME_ID);
	const uint64_t sent = send_round(s, port, flows, atof(argv[5]), UINT64_MAX, atof(argv[6]));
	printf("%ju %.0f %.0f\n", (uintmax_t)sent, (seconds_of(CLOCK_MONOTONIC) - wall) * 1e9,
	       (seconds_of(CLOCK_THREAD_CPUTIME_ID) - processor) * 1e9);
	return EXIT_SUCCESS;
}
